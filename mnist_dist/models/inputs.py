"""What a person hands to `Bundle.predict`, as the model's input.

Owns: which kinds of images are taken, their conversion, and errors that name the image. Does not own: decoding
(`images/decoder`), Pillow's modes (`images/pillow`), or the prediction (`bundle`).

A path, bytes and a file are decoded as in scoring. A PIL image and an array hold pixels already, so that a large JPEG
opened with Pillow differs a little from its file, which is decoded at a reduced size.
"""

# H = height px, W = width px, C = channels (1 grey, 3 RGB)

import os
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image

from mnist_dist.errors import ConfigError, ImageError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.pillow import upright_pixels
from mnist_dist.images.pixels import Pixels, match_channels, resize_pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.store.anywhere import ANYWHERE

Image = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | PIL.Image.Image | npt.NDArray[Any]
"""A path or URI; the bytes of a file; a file opened in binary mode, which is read from where it stands to its end; a
PIL image; or pixels in 0-255: `uint8` or float, `[H, W]`, `[H, W, 1]` or `[H, W, 3]`."""
KINDS = "a path or URI, bytes, a file opened in binary mode, a PIL image or a NumPy array"
_Error = TypeVar("_Error", bound=ConfigError | ImageError)


def input_pixels(image: Image, spec: ImageSpec, *, place: str = "") -> Pixels:
    """An image of any size as the model's input, `uint8 [H, W, C]`, 0-255.

    Args:
        image: of one of the kinds of `Image`.
        spec: size and channels of the input, and how images are fitted to it.
        place: of the image in a batch, such as "images[3]: "; stands at the beginning of messages.

    Raises:
        ConfigError: it is of no such kind, or an array has another dtype, shape or range.
        ImageError: it cannot be decoded.
        FileNotFoundError, PermissionError, ServiceError: it cannot be read.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return _decoded(ANYWHERE.read_bytes(os.fspath(image)), spec, name=f"{os.fspath(image)}: ")
        if isinstance(image, bytes | bytearray | memoryview):
            return _decoded(bytes(image), spec)
        if isinstance(image, np.ndarray | PIL.Image.Image):
            pixels = _checked(image) if isinstance(image, np.ndarray) else _of_pillow(image)
            return resize_pixels(match_channels(pixels, spec.channels), spec)
        return _decoded(_read(image), spec, name=_name_of(image))
    except (ConfigError, ImageError) as err:
        raise _with_place(err, place) from err.__cause__


def _with_place(error: _Error, place: str) -> _Error:
    if isinstance(error, ImageError):
        return type(error)(error.status, f"{place}{error.message}")
    return type(error)(f"{place}{error}")


def _decoded(data: bytes, spec: ImageSpec, *, name: str = "") -> Pixels:
    try:
        return decode_image(data, spec).pixels
    except ImageError as err:
        raise ImageError(err.status, f"{name}{err.message}") from err


def _read(file: Any) -> bytes:
    """What is left of a file, once it is known to be one."""
    if not callable(getattr(file, "read", None)):
        is_many = isinstance(file, list | tuple) or hasattr(file, "__next__")
        hint = "; several images are one flat list or tuple" if is_many else ""
        raise ConfigError(f"an image is {KINDS}{hint}. Received: {type(file).__name__}")
    data = file.read()
    if not isinstance(data, bytes):
        raise ConfigError(f"a file must be opened in binary mode, open(path, 'rb'). Received: {_name_of(file)}text")
    if not data:
        raise ImageError("empty", f"{_name_of(file)}nothing is left to read of the file; file.seek(0) rewinds it")
    return data


def _name_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return f"{name}: " if isinstance(name, str) else ""


def _of_pillow(image: PIL.Image.Image) -> Pixels:
    try:
        return upright_pixels(image)
    except Exception as err:  # Pillow decodes when it is asked for pixels, and raises whatever it meets.
        name = getattr(image, "filename", "")
        raise ImageError("unreadable", f"{f'{name}: ' if name else ''}{err or type(err).__name__}") from err


def _checked(image: npt.NDArray[Any]) -> Pixels:
    """The array as `uint8 [H, W, C]`; raises ConfigError where it is not an image."""
    expected = "an image is uint8 or float, 0-255, of shape [H, W], [H, W, 1] or [H, W, 3]"
    received = f"Received: {image.dtype} of shape {list(image.shape)}"
    right_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
    right_dtype = image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)
    if not right_shape or not right_dtype or image.size == 0:
        hint = "; for several images pass a list" if image.ndim == 4 else ""
        raise ConfigError(f"{expected}{hint}. {received}")
    if image.dtype != np.uint8:
        _check_range(image, f"{expected}. {received}")
    pixels: Pixels = np.rint(image).astype(np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _check_range(image: npt.NDArray[Any], message: str) -> None:
    low, high = image.min(), image.max()
    if not (np.isfinite(image).all() and low >= 0 and high <= 255):
        raise ConfigError(f"{message} with values from {low} to {high}")
    if 0 < high <= 1:  # The model would see a black image and predict a class for it without any error.
        raise ConfigError(f"{message} with values from {low} to {high}: multiply by 255")
