"""The data sets known by name (digits, MNIST, Fashion-MNIST, EMNIST) as arrays in memory.

Owns: finding their files, reading their formats (idx, .npz, Keras' download) and checking them, and their images as
rows of a listing and as PNG files. Does not own: how the arrays are used.
"""

# N = records, H = height px, W = width px, C = channels

import functools
import gzip
import hashlib
import io
import math
import string
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from mnist_dist.errors import DataError
from mnist_dist.images.pixels import Pixels
from mnist_dist.sources import image_table
from mnist_dist.sources.columns import LABEL, SPLIT
from mnist_dist.sources.image_table import ImageRow
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, join, parent_of

_DIGIT_NAMES = tuple("0123456789")
# Source: the README of zalandoresearch/fashion-mnist, section Labels
_FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_DIGITS_AND_CAPITALS = (*_DIGIT_NAMES, *string.ascii_uppercase)
# Source: G. Cohen et al., "EMNIST: an extension of MNIST to handwritten letters" (2017), figure 2 and table II: the
# letters whose upper and lower case look alike are merged in `bymerge` and `balanced`, and all of them in `letters`.
_EMNIST_NAMES = {
    "byclass": (*_DIGITS_AND_CAPITALS, *string.ascii_lowercase),
    "bymerge": (*_DIGITS_AND_CAPITALS, *"abdefghnqrt"),
    "balanced": (*_DIGITS_AND_CAPITALS, *"abdefghnqrt"),
    "letters": tuple(string.ascii_uppercase),
    "digits": _DIGIT_NAMES,
    "mnist": _DIGIT_NAMES,
}
PACKING = "array:"
"""Begins the packing of a row of a listing; the name of the data set follows."""
_IDX_STEMS = {"train": "train", "test": "t10k"}
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class ArrayPart:
    """One split of a data set in memory."""

    split: str | None
    """`train` or `test`; None: the data is not split."""
    images: npt.NDArray[Any]
    """`uint8 [N, H, W]` or `[N, H, W, C]`, 0-255."""
    labels: npt.NDArray[Any]
    """Integer `[N]`, 0 to number of classes - 1."""


@dataclass(frozen=True)
class Arrays:
    """A data set in memory."""

    class_names: tuple[str, ...]
    parts: Sequence[ArrayPart]

    @property
    def pixels(self) -> Pixels:
        """`uint8 [N, H, W, C]`: all parts, in order."""
        images = np.concatenate([part.images for part in self.parts])
        return images if images.ndim == 4 else images[..., None]


def read_arrays(name: str, data_dir: str | None) -> Arrays:
    """Reads and checks a data set of `NAMED_ARRAYS`.

    Args:
        name: a key of `NAMED_ARRAYS`.
        data_dir: a folder of idx files (plain or .gz) or an .npz file. None: Keras downloads the data.

    Returns:
        The data, whose images all have the same shape.

    Raises:
        DataError: a file is missing or corrupt, or the download failed.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    data = NAMED_ARRAYS[name](name, data_dir)
    for part in data.parts:
        _check_part(f"{name} {part.split or ''}".strip(), part, len(data.class_names))
    shapes = sorted({part.images.shape[1:] for part in data.parts})
    if len(shapes) > 1:
        raise DataError(f"{name}: the images of all splits must have one size. Received: {shapes}")
    return data


def list_rows(name: str, data_dir: str | None, *, labelled: bool) -> tuple[pa.Table, tuple[str, ...]]:
    """The images as rows of a listing, `name/split/00017`, and the class names.

    Args:
        name, data_dir: as for `read_arrays`.
        labelled: add `label` and `split`.

    Raises:
        DataError, PermissionError, ServiceError, StorageError: as from `read_arrays`.
    """
    _cached.cache_clear()  # The files may have changed since the last listing.
    data = _cached(name, absolute(data_dir) if data_dir else None)
    etag = hashlib.sha256(np.ascontiguousarray(data.pixels).data).hexdigest()
    uris = (f"{name}/{part.split or 'all'}/{row:05d}" for part in data.parts for row in range(len(part.images)))
    folder = absolute(data_dir) if data_dir else ""
    table = image_table.table_of(
        ImageRow(uri, None, etag, archive=folder, packing=f"{PACKING}{name}", offset=row)
        for row, uri in enumerate(uris)
    )
    if labelled:
        labels = np.concatenate([part.labels for part in data.parts]).astype(np.int64)
        splits = [part.split for part in data.parts for _ in part.labels]
        table = table.append_column(LABEL, pa.array(data.class_names, pa.string()).take(pa.array(labels)))
        table = table.append_column(SPLIT, pa.array(splits, pa.string()))
    return table, data.class_names


def encoded_rows(name: str, data_dir: str | None, rows: Sequence[int]) -> Iterator[bytes]:
    """The images at `rows` of `list_rows` as PNG files; raises as `read_arrays` does."""
    pixels = cached_pixels(name, data_dir)
    for row in rows:
        image = pixels[row, ..., 0] if pixels.shape[3] == 1 else pixels[row, ..., ::-1]  # OpenCV has BGR.
        yield cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes()


def cached_pixels(name: str, data_dir: str | None) -> Pixels:
    """The images of `list_rows`, `uint8 [N, H, W, C]`; raises as `read_arrays` does."""
    return _cached(name, absolute(data_dir) if data_dir else None).pixels


@functools.lru_cache(maxsize=1)
def _cached(name: str, data_dir: str | None) -> Arrays:
    return read_arrays(name, data_dir)  # Two threads that ask at once read it twice.


def write_digits(uri: str, *, count: int) -> None:
    """Writes the first scikit-learn digits to a tar of PNG files, `CLASS/NUMBER.png`, to try things out with.

    Args:
        uri: URI of the archive.
        count: number of images, at most 1,797.

    Raises:
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    (digits,) = read_arrays("digits", None).parts
    with ANYWHERE.new_object(uri) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for number, (pixels, label) in enumerate(zip(digits.images[:count], digits.labels, strict=False)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            member = tarfile.TarInfo(f"{label}/{number:04d}.png")
            member.size = png.tell()
            png.seek(0)
            archive.addfile(member, png)


def parse_idx(data: bytes, *, dimensions: int, place: str) -> Pixels:
    """Parses the array in an idx file.

    Args:
        data: the uncompressed file.
        dimensions: number of dimensions that the array must have.
        place: the file's name, for messages.

    Returns:
        `uint8`, of the shape that the header gives.

    Raises:
        DataError: the magic number or the number of bytes is wrong.

    Source: Y. LeCun, "The MNIST database", file formats: 0, 0, type (8: unsigned byte), number of dimensions, then
    each size as a big-endian uint32.
    """
    magic, header_bytes = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if data[:4] != magic:
        raise DataError(f"{place}: an idx file of this kind starts with 0x{magic.hex()}. Received: 0x{data[:4].hex()}")
    if len(data) < header_bytes:
        raise DataError(f"{place}: too short for the header of an idx file. Received: {len(data)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    expected = header_bytes + math.prod(shape)
    if len(data) != expected:
        fault = "too short" if len(data) < expected else "trailing bytes"
        raise DataError(
            f"{place}: {fault}; its header {list(shape)} means {expected:,} bytes. Received: {len(data):,} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape)


def _read_digits(name: str, data_dir: str | None) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()  # Comes with scikit-learn, so it needs no file and no network.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Arrays(_DIGIT_NAMES, [ArrayPart(None, pixels, digits.target)])


def _read_mnist(name: str, data_dir: str | None) -> Arrays:
    class_names = _FASHION_NAMES if name == "fashion_mnist" else _DIGIT_NAMES
    if data_dir is None:
        return Arrays(class_names, _download(name))
    if data_dir.lower().endswith(".npz"):
        return Arrays(class_names, _read_npz(data_dir))
    return Arrays(class_names, [_read_idx_pair(name, data_dir, split, stem) for split, stem in _IDX_STEMS.items()])


def _read_emnist(name: str, data_dir: str | None) -> Arrays:
    """The images are stored transposed, and the labels of `letters` begin at 1."""
    if data_dir is None:
        raise DataError(f"{name} is not downloaded; set data_dir to a folder of its idx files. Received: data_dir=None")
    subset = name.partition("_")[2] or _emnist_subset(data_dir)
    first = 1 if subset == "letters" else 0
    parts = [
        ArrayPart(part.split, part.images.transpose(0, 2, 1), part.labels.astype(np.int64) - first)
        for part in (_read_idx_pair(name, data_dir, split, f"emnist-{subset}-{split}") for split in _IDX_STEMS)
    ]
    return Arrays(_EMNIST_NAMES[subset], parts)


def _emnist_subset(folder: str) -> str:
    """The only subset whose files are in the folder."""
    files = ANYWHERE.list_level(absolute(folder)).files
    found = sorted({subset for subset in _EMNIST_NAMES for file in files if file.startswith(f"emnist-{subset}-train-")})
    if len(found) != 1:
        names = ", ".join(f"emnist_{subset}" for subset in found or _EMNIST_NAMES)
        raise DataError(f"{folder}: name one of the subsets: {names}. Received: files of {', '.join(found) or 'none'}")
    return found[0]


NAMED_ARRAYS: dict[str, Callable[[str, str | None], Arrays]] = {
    "digits": _read_digits,
    "mnist": _read_mnist,
    "fashion_mnist": _read_mnist,
    "emnist": _read_emnist,
    **{f"emnist_{subset}": _read_emnist for subset in _EMNIST_NAMES},
}


def _download(name: str) -> list[ArrayPart]:
    import keras

    try:
        train, test = getattr(keras.datasets, name).load_data()
    except Exception as err:  # Keras raises a bare Exception if a download fails.
        raise DataError(
            f"{name} is not in Keras' cache and could not be downloaded: {err}. Without a network, provide the four idx"
            f" files or an .npz with {', '.join(_NPZ_KEYS)}, and set data_dir to it. Received: data_dir=None"
        ) from err
    return [ArrayPart("train", *train), ArrayPart("test", *test)]


def _read_npz(uri: str) -> list[ArrayPart]:
    data, uri = _read_first([uri], uri)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            missing = [key for key in _NPZ_KEYS if key not in file.files]
            if missing:
                raise DataError(f"{uri} lacks {', '.join(missing)}. Received: {', '.join(file.files)}")
            arrays = [np.asarray(file[key]) for key in _NPZ_KEYS]  # A member that is no array comes as bytes.
    except DataError:
        raise
    except Exception as err:  # The border: NumPy and zipfile raise a dozen types on damaged bytes.
        raise DataError(f"{uri}: not a readable .npz of arrays: {err or type(err).__name__}") from err
    return [ArrayPart("train", *arrays[:2]), ArrayPart("test", *arrays[2:])]


def _read_idx_pair(name: str, folder: str, split: str, stem: str) -> ArrayPart:
    images, image_file = _read_idx(name, folder, f"{stem}-images", 3)
    labels, label_file = _read_idx(name, folder, f"{stem}-labels", 1)
    if len(images) != len(labels):
        raise DataError(f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels")
    return ArrayPart(split, images, labels)


def _read_idx(name: str, folder: str, stem: str, dimensions: int) -> tuple[Pixels, str]:
    names = [f"{stem}{separator}idx{dimensions}-ubyte{end}" for separator in "-." for end in ("", ".gz")]
    data, uri = _read_first([join(folder, file) for file in names], f"{name} in {folder}")
    if uri.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as err:
            raise DataError(f"{uri}: not a complete gzip file: {err}") from err
    return parse_idx(data, dimensions=dimensions, place=uri), uri


def _read_first(uris: Sequence[str], place: str) -> tuple[bytes, str]:
    for uri in uris:
        try:
            return ANYWHERE.read_bytes(uri), uri
        except FileNotFoundError:
            continue
        except PermissionError as err:
            raise DataError(f"{place}: permission to read {uri} was denied: {err.strerror}") from err
    names = ", ".join(uri.rpartition("/")[2] for uri in uris)
    there = what_is_there(uris[0] if len(uris) == 1 else parent_of(absolute(uris[0])))
    raise DataError(f"{place}: found none of the files {names}{there}")


def _check_part(place: str, part: ArrayPart, num_classes: int) -> None:
    shape, labels = part.images.shape, part.labels
    is_image_shape = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if part.images.dtype != np.uint8 or not is_image_shape or 0 in shape:
        raise DataError(
            f"{place}: images must be uint8 [N, H, W] or [N, H, W, 1 or 3], at least one of at least 1 px."
            f" Received: {part.images.dtype} {list(shape)}"
        )
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{place}: each of the {shape[0]} images must have one integer label."
            f" Received: {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{place}: labels must be 0 to {num_classes - 1}. Received: {labels.min()} to {labels.max()}")
