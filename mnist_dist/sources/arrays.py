"""The data sets known by name (digits, MNIST and Fashion-MNIST) as arrays in memory.

Owns: finding their files, reading their formats (idx, .npz, Keras' download) and checking them. Does not own: how the
arrays are used.
"""

# N = records, H = height px, W = width px, C = channels

import gzip
import io
import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mnist_dist.errors import DataError
from mnist_dist.images.decoder import Pixels
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

_DIGIT_NAMES = tuple("0123456789")
# Source: the README of zalandoresearch/fashion-mnist, section Labels
_FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
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
class NamedArrays:
    """A data set: its class names, and the function that reads its parts from `data_dir`."""

    class_names: tuple[str, ...]
    read: Callable[[str, str | None], list[ArrayPart]]


def read_arrays(name: str, data_dir: str | None) -> tuple[tuple[str, ...], list[ArrayPart]]:
    """Reads and checks a data set of `NAMED_ARRAYS`.

    Args:
        name: a key of `NAMED_ARRAYS`.
        data_dir: a folder of idx files (plain or .gz) or an .npz file. None: Keras downloads the data.

    Returns:
        The class names and the parts. All images have the same shape.

    Raises:
        DataError: a file is missing or corrupt, or the download failed.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    data = NAMED_ARRAYS[name]
    parts = data.read(name, data_dir)
    for part in parts:
        _check_part(f"{name} {part.split or ''}".strip(), part, len(data.class_names))
    shapes = sorted({part.images.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise DataError(f"{name}: the images of all splits must have one size. Received: {shapes}")
    return data.class_names, parts


def write_digits(uri: str, *, count: int) -> None:
    """Writes the first scikit-learn digits to a tar of PNG files, `CLASS/NUMBER.png`, to try things out with.

    Args:
        uri: URI of the archive.
        count: number of images, at most 1,797.

    Raises:
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    _, (digits,) = read_arrays("digits", None)
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


def _read_digits(name: str, data_dir: str | None) -> list[ArrayPart]:
    from sklearn.datasets import load_digits

    digits = load_digits()  # Comes with scikit-learn, so it needs no file and no network.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [ArrayPart(None, pixels, digits.target)]


def _read_mnist(name: str, data_dir: str | None) -> list[ArrayPart]:
    if data_dir is None:
        return _download(name)
    if data_dir.lower().endswith(".npz"):
        return _read_npz(data_dir)
    return [_read_idx_pair(name, data_dir, split) for split in _IDX_STEMS]


NAMED_ARRAYS = {
    "digits": NamedArrays(_DIGIT_NAMES, _read_digits),
    "mnist": NamedArrays(_DIGIT_NAMES, _read_mnist),
    "fashion_mnist": NamedArrays(_FASHION_NAMES, _read_mnist),
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
            arrays = [file[key] for key in _NPZ_KEYS]
    except DataError:
        raise
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as err:
        raise DataError(f"{uri}: not a readable .npz of arrays: {err}") from err
    return [ArrayPart("train", *arrays[:2]), ArrayPart("test", *arrays[2:])]


def _read_idx_pair(name: str, folder: str, split: str) -> ArrayPart:
    stem = _IDX_STEMS[split]
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
    raise DataError(f"{place}: found none of the files {names}")


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
