"""A finished model as a folder, and predictions with it.

Owns: the folder's files (`model.keras`, `bundle.json`, `history.csv`, `calibration.parquet`), how it comes to be,
what is checked when it is opened, and the prediction for single images. Does not own the graph inside `model.keras`
(`classifier`), nor scoring at scale.

Contract: the folder is written under a temporary name and renamed when it is complete; `bundle.json` is written last,
so a folder without it is unfinished. A finished bundle is never written again. Its model id is the sha256 of
`model.keras`: it names the file, not the training. `model.keras` needs nothing of this package.
"""

# H = height px, W = width px, C = channels (1 grey, 3 RGB), K = classes

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from mnist_dist import documents
from mnist_dist.data.images import ImageSpec, decode_image, match_channels, resize_pixels
from mnist_dist.errors import BundleError, ConfigError, DataError
from mnist_dist.models.history import Epoch, history_csv
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, is_remote, join, temporary_name

if TYPE_CHECKING:
    import keras
    import pyarrow as pa

FORMAT_VERSION = 1
BUNDLE_FILE = "bundle.json"
MODEL_FILE = "model.keras"
HISTORY_FILE = "history.csv"
CALIBRATION_FILE = "calibration.parquet"
REPORT_FILE = "report.html"

Image = str | os.PathLike[str] | npt.NDArray[Any]
"""A file (path or `s3://` URI), or pixels of 0-255: `uint8` or float, `[H, W]`, `[H, W, 1]` or `[H, W, 3]`."""


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """What `bundle.json` says.

    Args:
        class_names: in the order of the probabilities.
        spec: what the model takes.
        backbone: its name in the table.
        weights: what the training started from.
        config: the job's configuration, as JSON values.
        data_fingerprint: of the data it was trained on.
        validation: metrics on the validation images.
        test: metrics on the test images.
        model_id: sha256 of the file model.keras, hex; `write_bundle` fills in this and what follows.
        versions: of Python and of the packages that wrote it.
        created_at: ISO 8601, UTC.
        format_version: of the folder; this package reads 1.
    """

    class_names: tuple[str, ...]
    spec: ImageSpec
    backbone: str
    weights: str = "none"
    config: Mapping[str, Any] = field(default_factory=dict)
    data_fingerprint: str = "none"
    validation: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)
    model_id: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created_at: str = ""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Args:
        predicted_class: name of the most probable class.
        predicted_index: its number.
        confidence: its probability.
        probabilities: `float32 [K]`, in the order of the bundle's class names.
    """

    predicted_class: str
    predicted_index: int
    confidence: float
    probabilities: npt.NDArray[np.float32]


class Bundle:
    """An opened bundle. The model is loaded when it is first used."""

    def __init__(self, path: Path, info: BundleInfo) -> None:
        self.path = path
        self.info = info

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, model_id={self.info.model_id[:12]!r})"

    @functools.cached_property
    def model(self) -> "keras.Model":
        """`uint8 [B, H, W, C]`, 0-255 -> `float32 [B, K]` probabilities."""
        import keras

        return keras.saving.load_model(self.path / MODEL_FILE, compile=False)

    @overload
    def predict(self, image: Image) -> Prediction: ...

    @overload
    def predict(self, image: list[Any]) -> list[Prediction]: ...

    def predict(self, image: Image | list[Any]) -> Prediction | list[Prediction]:
        """Class, confidence and probabilities of an image, or of each of a list of images.

        Args:
            image: a file, or pixels of 0-255, or a list of them; of any size, resized as in training.

        Raises:
            ConfigError: an array is not an image: wrong dtype or shape.
            FileNotFoundError, PermissionError: a file cannot be read.
            ImageError: a file cannot be decoded.
        """
        if isinstance(image, str | os.PathLike | np.ndarray):
            return self._predict([image])[0]
        return self._predict(image)

    def _predict(self, images: Sequence[Image], *, batch_size: int = 32) -> list[Prediction]:
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            pixels = np.stack([_pixels(image, self.info.spec) for image in images[start : start + batch_size]])
            predictions.extend(self._prediction(row) for row in np.asarray(self.model(pixels, training=False)))
        return predictions

    def _prediction(self, probabilities: npt.NDArray[np.float32]) -> Prediction:
        index = int(probabilities.argmax())
        return Prediction(self.info.class_names[index], index, float(probabilities[index]), probabilities)


def write_bundle(
    path: Path,
    model: "keras.Model",
    info: BundleInfo,
    *,
    history: Iterable[Epoch] = (),
    calibration: "pa.Table | None" = None,
) -> BundleInfo:
    """Writes a local folder under a temporary name beside `path` and renames it when it is complete.

    To publish it elsewhere: `store.upload_folder(path, uri, last="bundle.json")`.

    Args:
        path: the folder to be; must not hold a finished bundle.
        model: `Classifier.model`, in float32; its BatchNorm is synchronised over workers no longer.
        info: what is known of it; its id, versions and time are filled in.
        history: the epochs of the training.
        calibration: held-out images for engine checks and int8; None leaves the file out.

    Returns:
        The info as it was written.

    Raises:
        BundleError: the path is taken, or the model does not fit the class names, the spec or the float32 policy.
    """
    _check_free(path)
    _check_model(model, info)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.mkdir()
        _unsynchronize(model)
        model.save(temporary / MODEL_FILE)
        (temporary / HISTORY_FILE).write_bytes(history_csv(history))
        if calibration is not None:
            _write_parquet(calibration, temporary / CALIBRATION_FILE)
        created_at = datetime.now(UTC).isoformat(timespec="seconds")
        info = replace(info, model_id=_sha256(temporary / MODEL_FILE), versions=_versions(), created_at=created_at)
        (temporary / BUNDLE_FILE).write_bytes(documents.encode(info))
        shutil.rmtree(path, ignore_errors=True)  # what an interrupted copy may have left; `_check_free` saw no bundle
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def load_bundle(uri: str | os.PathLike[str], *, store: Store = ANYWHERE) -> Bundle:
    """Opens a finished bundle and checks that its model is the one it was finished with.

    Args:
        uri: a folder, or an `s3://` prefix, which is copied to a temporary folder first.
        store: where it lies.

    Raises:
        BundleError: there is no bundle, it is unfinished or damaged, or of a newer format.
    """
    named = os.fspath(uri)
    path = _download(named, store) if is_remote(named) else Path(absolute(named))
    info = _read_info(path, named=named)
    model_file = path / MODEL_FILE
    found = _sha256(model_file) if model_file.is_file() else "no such file"
    if found != info.model_id:
        raise BundleError(
            f"{MODEL_FILE} in {named} is not the file that the bundle was finished with: "
            f"expected sha256 {info.model_id}. Received: {found}"
        )
    return Bundle(path, info)


def read_bundle_info(uri: str, *, store: Store = ANYWHERE) -> BundleInfo:
    """What a bundle says of itself; its model is not looked at.

    Args:
        uri: a folder or an `s3://` prefix.
        store: where it lies.

    Raises:
        BundleError: there is no bundle, it is unfinished, or of a newer format.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    try:
        data = store.read_bytes(join(absolute(uri), BUNDLE_FILE))
    except FileNotFoundError as err:
        raise BundleError(f"there is no bundle: it has no {BUNDLE_FILE}. Received: {uri!r}") from err
    return _decode_info(data, named=uri)


def _download(uri: str, store: Store) -> Path:
    path = Path(tempfile.mkdtemp(prefix="mnist_dist-bundle-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # not earlier: engines read the files when they like
    try:
        store.download_folder(uri, path)
    except FileNotFoundError as err:
        raise BundleError(f"there is no bundle. Received: {uri!r}") from err
    return path


def _read_info(path: Path, *, named: str) -> BundleInfo:
    file = path / BUNDLE_FILE
    if not file.is_file():
        if not path.is_dir():
            raise BundleError(f"there is no such folder of a bundle. Received: {named!r}")
        why = "is unfinished" if (path / MODEL_FILE).exists() else "is not a bundle"
        hint = f" (did you mean {named.rstrip('/')}/bundle?)" if (path / "bundle" / BUNDLE_FILE).exists() else ""
        raise BundleError(f"the folder {why}: it has no {BUNDLE_FILE}{hint}. Received: {named!r}")
    return _decode_info(file.read_bytes(), named=named)


def _decode_info(data: bytes, *, named: str) -> BundleInfo:
    file = join(named, BUNDLE_FILE)
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError) as err:
        raise BundleError(f"{file} is no JSON object with a format_version: {err!r}. Received: {named!r}") from err
    if version != FORMAT_VERSION:
        raise BundleError(
            f"bundles of format {FORMAT_VERSION} can be read; a newer mnist_dist reads newer ones. "
            f"Received: format_version={version} in {named!r}"
        )
    try:
        info = documents.decode(data, BundleInfo, uri=file)
    except DataError as err:
        raise BundleError(f"{err}. Received: {named!r}") from err
    if not info.model_id:
        raise BundleError(f"{file} names no model_id, the sha256 of {MODEL_FILE}. Received: {named!r}")
    return info


def _pixels(image: Image, spec: ImageSpec) -> npt.NDArray[np.uint8]:
    """`uint8 [H, W, C]` as the model takes it."""
    if not isinstance(image, np.ndarray):
        return decode_image(ANYWHERE.read_bytes(os.fspath(image)), spec).pixels
    return resize_pixels(match_channels(_checked_pixels(image), spec.channels), spec)


def _checked_pixels(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """`uint8 [H, W, C]`, or ConfigError."""
    expected = "an image is uint8 or float, 0-255, of shape [H, W], [H, W, 1] or [H, W, 3]"
    shown = f"Received: {image.dtype} of shape {list(image.shape)}"
    right_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
    right_dtype = image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)
    if not right_shape or not right_dtype or image.size == 0:
        hint = "; for several images pass a list" if image.ndim == 4 else ""
        raise ConfigError(f"{expected}{hint}. {shown}")
    if image.dtype != np.uint8:
        _check_range(image, f"{expected}. {shown}")
    pixels: npt.NDArray[np.uint8] = np.rint(image).astype(np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _check_range(image: npt.NDArray[Any], message: str) -> None:
    least, greatest = image.min(), image.max()
    if not (np.isfinite(image).all() and least >= 0 and greatest <= 255):
        raise ConfigError(f"{message} with values from {least} to {greatest}")
    if 0 < greatest <= 1:  # a black image to the model, which would answer all the same
        raise ConfigError(f"{message} with values from {least} to {greatest}: multiply by 255")


def _check_free(path: Path) -> None:
    if (path / BUNDLE_FILE).exists():
        raise BundleError(f"a finished bundle is never written again. Received: {str(path)!r}")
    unknown = sorted({entry.name for entry in path.glob("*")} - {MODEL_FILE, HISTORY_FILE, CALIBRATION_FILE})
    if unknown or path.is_file():
        raise BundleError(f"the folder for a bundle is new or empty. Received: {str(path)!r}, which holds {unknown}")


def _check_model(model: "keras.Model", info: BundleInfo) -> None:
    class_names, spec = info.class_names, info.spec
    expected = ((None, spec.height_px, spec.width_px, spec.channels), (None, len(class_names)))
    found = (tuple(model.input_shape), tuple(model.output_shape))
    if expected != found or len(set(class_names)) != len(class_names):
        raise BundleError(
            f"the model takes and gives {expected} for this spec and {len(class_names)} distinct class names. "
            f"Received: {found}, class_names={list(class_names)[:20]}"
        )
    policies = sorted({layer.dtype_policy.name for layer in all_layers(model)} - {"float32", "uint8"})
    if policies:
        raise BundleError(
            f"a bundle's model is saved with the float32 policy: build it in float32 and set the trained weights. "
            f"Received: layers with the policies {policies}"
        )


def _unsynchronize(model: "keras.Model") -> None:
    """Other backends than TensorFlow refuse to load synchronised BatchNorm, and a finished model does not train."""
    for layer in all_layers(model):
        if getattr(layer, "synchronized", False):
            layer.synchronized = False


def all_layers(model: "keras.Model") -> "list[keras.layers.Layer]":
    """The layers of a model, those of the models inside it too."""
    nested = [all_layers(layer) if hasattr(layer, "layers") else [layer] for layer in model.layers]
    return [layer for layers in nested for layer in layers]


def _write_parquet(table: "pa.Table", path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    import platform

    import mnist_dist

    packages = {name: metadata.version(name) for name in ("keras", "tensorflow", "numpy")}
    return {"python": platform.python_version(), "mnist_dist": mnist_dist.__version__, **packages}
