"""The same labelled images in every form that a source can have, for tests of several modules."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join


@dataclass(frozen=True)
class Labelled:
    """One image: `uint8 [H, W]`, and its class."""

    pixels: npt.NDArray[np.uint8]
    label: int
    number: int

    @property
    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def path(self) -> str:
        return f"{self.label}/{self.number:05d}.png"


Images = Sequence[Labelled]


def _folder(root: str, images: Images) -> tuple[str, ...]:
    for image in images:
        ANYWHERE.write_bytes(join(root, image.path), image.png)
    return (root,)


def _glob(root: str, images: Images) -> tuple[str, ...]:
    _folder(join(root, "in"), images)
    return (join(root, "in/*/*.png"),)


def _tar_of(files: Iterator[tuple[str, bytes]], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload] # modes by name
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _files(images: Images, folder: str = "") -> Iterator[tuple[str, bytes]]:
    return ((folder + image.path, image.png) for image in images)


def _tar(root: str, images: Images) -> tuple[str, ...]:
    ANYWHERE.write_bytes(join(root, "a.tar"), _tar_of(_files(images), "w"))
    return (join(root, "a.tar"),)


def _tar_gz(root: str, images: Images) -> tuple[str, ...]:
    """With a folder around everything, as people pack folders."""
    ANYWHERE.write_bytes(join(root, "a.tgz"), _tar_of(_files(images, "digits/png/"), "w:gz"))
    return (root,)


def _tar_zst(root: str, images: Images) -> tuple[str, ...]:
    """Compressed with zstd, under a name that does not say so."""
    packed = pa.Codec("zstd").compress(_tar_of(_files(images), "w"), asbytes=True)
    ANYWHERE.write_bytes(join(root, "a.tar"), packed)
    return (join(root, "a.tar"),)


def _zip(root: str, images: Images) -> tuple[str, ...]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in _files(images):
            archive.writestr(name, data)
    ANYWHERE.write_bytes(join(root, "a.zip"), buffer.getvalue())
    return (join(root, "a.zip"),)


def _webdataset(root: str, images: Images, beside: Callable[[Labelled], tuple[str, bytes]]) -> tuple[str, ...]:
    for shard in range(2):
        files = (
            (f"{image.number:05d}{suffix}", data)
            for image in images[shard::2]
            for suffix, data in ((".png", image.png), beside(image))
        )
        ANYWHERE.write_bytes(join(root, f"shards/{shard:06d}.tar"), _tar_of(files, "w"))
    return (join(root, "shards"),)


def _webdataset_cls(root: str, images: Images) -> tuple[str, ...]:
    return _webdataset(root, images, lambda image: (".cls", b"%d\n" % image.label))


def _webdataset_json(root: str, images: Images) -> tuple[str, ...]:
    return _webdataset(root, images, lambda image: (".json", json.dumps({"label": image.label, "x": 1}).encode()))


def _webdataset_txt(root: str, images: Images) -> tuple[str, ...]:
    return _webdataset(root, images, lambda image: (".txt", b"%d" % image.label))


def _write_parquet(uri: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=70)
    ANYWHERE.write_bytes(uri, buffer.getvalue())


def _parquet(root: str, images: Images) -> tuple[str, ...]:
    table = pa.table({"image": [image.png for image in images], "label": [str(image.label) for image in images]})
    _write_parquet(join(root, "a.parquet"), table)
    return (join(root, "a.parquet"),)


def _hugging_face(root: str, images: Images) -> tuple[str, ...]:
    """A repository as on the hub: class numbers, names in the metadata, and a picture that is not part of the data."""
    names = [str(label) for label in range(10)]
    features = {"picture": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for shard in range(2):
        part = images[shard::2]
        table = pa.table(
            {
                "picture": [{"bytes": image.png, "path": f"{image.number}.png"} for image in part],
                "label": pa.array([image.label for image in part], pa.int64()),
            }
        ).replace_schema_metadata(metadata)
        _write_parquet(join(root, f"repository/data/part-{shard:05d}-of-00002.parquet"), table)
    ANYWHERE.write_bytes(join(root, "repository/README.md"), b"# digits")
    ANYWHERE.write_bytes(join(root, "repository/cover.png"), images[0].png)
    return (join(root, "repository"),)


def _csv(root: str, images: Images) -> tuple[str, ...]:
    """URIs without classes in their names, and a column of labels."""
    lines = ["uri,label"]
    for image in images:
        ANYWHERE.write_bytes(join(root, f"flat/{image.number}.png"), image.png)
        lines.append(f"{join(root, f'flat/{image.number}.png')},{image.label}")
    ANYWHERE.write_bytes(join(root, "list.csv"), "\n".join(lines).encode())
    return (join(root, "list.csv"),)


def _text(root: str, images: Images) -> tuple[str, ...]:
    """Members of an archive, one per line."""
    (archive,) = _tar(root, images)
    ANYWHERE.write_bytes(join(root, "list.txt"), "\n".join(f"{archive}!{image.path}" for image in images).encode())
    return (join(root, "list.txt"),)


def _mixture(root: str, images: Images) -> tuple[str, ...]:
    third = len(images) // 3
    return (
        *_folder(join(root, "folder"), images[:third]),
        *_zip(root, images[third : 2 * third]),
        *_parquet(root, images[2 * third :]),
    )


FORMS: dict[str, Callable[[str, Images], tuple[str, ...]]] = {
    "folder": _folder,
    "glob": _glob,
    "tar": _tar,
    "tar.gz": _tar_gz,
    "tar.zst": _tar_zst,
    "zip": _zip,
    "webdataset-cls": _webdataset_cls,
    "webdataset-json": _webdataset_json,
    "webdataset-txt": _webdataset_txt,
    "parquet": _parquet,
    "hugging-face": _hugging_face,
    "csv": _csv,
    "text": _text,
    "mixture": _mixture,
}
"""Writes images below a root, and gives the inputs that name them."""
