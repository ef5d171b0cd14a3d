"""Images for checking an import: a person's folder, or crops of two photographs.

Owns: choosing, reading and labelling them. Does not own: what is compared on them (`comparison`).
"""

# H = height px, W = width px

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa

from mnist_dist.config import DecodeConfig
from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import probe_image
from mnist_dist.score_config import InputConfig
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.reading import read_in_order

if TYPE_CHECKING:
    from PIL import Image

MAX_CHECKED, MAX_CALIBRATION = 500, 2_000
_CROPS = ((427, 640), (640, 480), (333, 500), (224, 224), (500, 375), (97, 211), (300, 301), (256, 400), (41, 35))
"""Height and width, px: large and small, upright and flat, odd and even."""


@dataclass(frozen=True)
class Files(Sequence[bytes]):
    """Encoded images in a folder, read one at a time."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> "Files": ...

    def __getitem__(self, index: int | slice) -> "bytes | Files":
        return Files(self.paths[index]) if isinstance(index, slice) else self.paths[index].read_bytes()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Encoded images, their names, and their classes where folders name them."""

    files: Files
    names: tuple[str, ...]
    labels: tuple[int | None, ...]
    """Index of the class whose name the image's folder has."""
    left_out: tuple[str, ...] = ()
    """What could not be read, and why."""

    @property
    def are_labelled(self) -> bool:
        """Whether each has a class."""
        return bool(self.labels) and None not in self.labels


def list_images(folder: str, *, max_images: int) -> pa.Table:
    """The images of a folder, prefix or archive, evenly thinned out: rows of `image_table.COLUMNS`.

    Raises:
        ConfigError: there are none.
    """
    table = list_inputs(InputConfig(input=(folder,))).table
    rows = np.linspace(0, len(table) - 1, min(max_images, len(table))).astype(np.int64)
    return table.take(pa.array(rows))


def read_examples(rows: pa.Table, class_names: Sequence[str], *, scratch: Path) -> Examples:
    """Reads images into a folder; those that cannot be read or have no readable header are left out.

    Args:
        rows: from `list_images`.
        class_names: what folders are compared with.
        scratch: a new folder.
    """
    scratch.mkdir()
    numbers = {name: number for number, name in enumerate(class_names)}
    paths, names, labels, left_out = list[Path](), list[str](), list[int | None](), list[str]()
    contents = read_in_order(rows, max_bytes=DecodeConfig().max_bytes)
    for uri, data in zip(rows["uri"].to_pylist(), contents, strict=True):
        try:
            if isinstance(data, ImageError):
                raise data
            probe_image(data)
        except ImageError as error:
            left_out.append(f"{uri}: {error}")
            continue
        paths.append(scratch / f"{len(paths):06d}")
        paths[-1].write_bytes(data)
        names.append(uri)
        labels.append(numbers.get(uri.rsplit("/", 2)[-2] if "/" in uri else ""))
    return Examples(files=Files(tuple(paths)), names=tuple(names), labels=tuple(labels), left_out=tuple(left_out))


def built_in_examples(scratch: Path) -> Examples:
    """Twelve images made of scikit-learn's two photographs, JPEG and PNG, of many sizes, one of them grey."""
    scratch.mkdir()
    paths = []
    for number, data in enumerate(_built_in()):
        paths.append(scratch / f"{number:06d}")
        paths[-1].write_bytes(data)
    names = tuple(f"crop {number + 1} of scikit-learn's photographs" for number in range(len(paths)))
    return Examples(files=Files(tuple(paths)), names=names, labels=(None,) * len(paths))


def _built_in() -> Iterator[bytes]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(_CROPS):
        photograph = photographs[number % 2].resize((max(640, width), max(640, height)))
        left = int(random.integers(0, photograph.width - width + 1))
        top = int(random.integers(0, photograph.height - height + 1))
        yield _encoded(photograph.crop((left, top, left + width, top + height)), "JPEG")
    yield _encoded(photographs[0].convert("L"), "JPEG")
    yield _encoded(photographs[1].crop((100, 50, 400, 350)), "PNG")
    yield _encoded(photographs[1].transpose(Image.Transpose.ROTATE_90), "JPEG")


def _encoded(image: "Image.Image", kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, quality=90)
    return stream.getvalue()
