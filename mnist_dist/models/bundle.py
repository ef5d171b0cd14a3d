"""A finished model as a folder, and predictions with it.

Owns: the folder's files (`model.keras` or `model.onnx`, `bundle.json`, `MLmodel`, `history.csv`,
`calibration.parquet`), how they are written, what is checked when a bundle is opened, and predictions for single
images. Does not own: the graph inside `model.keras` (`classifier`), what is required of `model.onnx` (`onnx_file`), the
content of `MLmodel` (`mlmodel`), or scoring at scale.

Contract: the folder is written under a temporary name and renamed when it is complete; `bundle.json` is written last,
so a folder without it is unfinished. A finished bundle is never overwritten. Its model id is the sha256 of the model
file: it identifies the file, not the training. The model file loads without this package: `model.keras` with Keras in
safe mode, `model.onnx` with ONNX Runtime.
"""

# H = height px, W = width px, C = channels (1 grey, 3 RGB), K = classes

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from mnist_dist import documents
from mnist_dist.config import DEFAULT_THRESHOLD, Activation, CombineMethod
from mnist_dist.errors import BundleError, ConfigError, DataError, StorageError
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.history import HISTORY_FILE, Epoch, history_csv
from mnist_dist.models.inputs import Image, input_pixels
from mnist_dist.models.mlmodel import MLMODEL_FILE, Described, mlmodel
from mnist_dist.models.native_log import starting_quietly
from mnist_dist.models.onnx_file import (
    FEATURES,
    IMAGE,
    PROBABILITIES,
    Declared,
    Tensor,
    check_onnx,
    declared,
    open_session,
    run_session,
    session_batch,
)
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Level, Store
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, is_remote, join, temporary_name

if TYPE_CHECKING:
    import keras
    import pyarrow as pa

FORMAT_VERSION = 1
BUNDLE_FILE = "bundle.json"
ModelFile = Literal["model.keras", "model.onnx"]
KERAS_FILE: ModelFile = "model.keras"
ONNX_FILE: ModelFile = "model.onnx"
NETWORK_LAYER = "network"
"""In an imported `model.keras`, the layer with the foreign model; its second output, if there is one, are the features,
which a layer of its own named `features` passes on. A layer `probabilities` may follow."""
NO_FEATURES = "this imported model gives no features: import it again with --features-node"
CALIBRATION_FILE = "calibration.parquet"
REPORT_FILE = "report.html"
_FILES = (KERAS_FILE, ONNX_FILE, CALIBRATION_FILE, MLMODEL_FILE)
"""Of any bundle, beside `bundle.json`."""
FOREIGN_SUFFIXES = (".keras", ".h5", ".hdf5", ".onnx")  # of files that can be imported, and are no bundle
PREDICT_BATCH = 32
_MAX_NAMES = 1_000  # of a folder that is no bundle, which may be a bucket of millions


@dataclass(frozen=True, kw_only=True)
class Imported:
    """How a foreign model became a bundle.

    Args:
        source: the file, folder or name that was imported, without secrets.
        kind: `keras`, `saved_model`, `onnx`, `hugging_face`, `timm` or `torchvision`.
        scale: pixels in 0-255 are multiplied by this, one number for all channels or one per channel.
        offset: added after that, likewise.
        bgr: the channels were reversed before that.
        activation: what was put behind the model's own output.
        assumed: what neither the source nor a flag said, one sentence each.
        fast_agreement: share of the compared images with the same top class under fast decoding; None: not measured.
        fast_images: number of these images.
    """

    source: str
    kind: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    bgr: bool
    activation: Activation
    assumed: tuple[str, ...] = ()
    fast_agreement: float | None = None
    fast_images: int = 0


@dataclass(frozen=True, kw_only=True)
class CombinedMember:
    """A bundle of which, with others, this one was made.

    Args:
        uri: where it was, without secrets.
        model_id: of its model file.
        is_used: False: a greedy soup left it out.
        validation_accuracy: on the images that judged, 0-1; None: it was not measured.
    """

    uri: str
    model_id: str
    is_used: bool = True
    validation_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Combined:
    """How several bundles became one.

    Args:
        method: `soup`, `greedy-soup` or `ensemble`.
        members: in the order in which they were given.
        data: what `--data` named, without secrets; empty: nothing.
        max_abs_difference: the largest difference of a probability of the written model from what was computed from its
            members, on a few images.
    """

    method: CombineMethod
    members: tuple[CombinedMember, ...]
    data: tuple[str, ...] = ()
    max_abs_difference: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """The content of `bundle.json`.

    Args:
        class_names: in the order of the probabilities; empty: the model gives features only, as a frozen backbone.
        spec: size and channels of the model's input.
        backbone: its name in the table of backbones; of an imported model, what its source calls it.
        model_file: `model.keras` or `model.onnx`.
        multi_label: each class has a probability of its own (sigmoid).
        imported: how a foreign model became this bundle; None: it was trained here.
        combined: how several bundles became this one; None: it is of one model.
        weights: the weights that training started from.
        config: the job's configuration, as JSON values.
        data_fingerprint: identifies the training data.
        validation: metrics on the validation images.
        test: metrics on the test images.
        model_id: sha256 of the model file, hex; what writes the bundle fills in this and the fields below.
        versions: of Python and of the packages that wrote the model file.
        created_at: ISO 8601, UTC.
        format_version: version of the folder's layout; this package reads 1.
    """

    class_names: tuple[str, ...]
    spec: ImageSpec
    backbone: str
    model_file: ModelFile = KERAS_FILE
    multi_label: bool = False
    imported: Imported | None = None
    combined: Combined | None = None
    weights: str = "none"
    config: Mapping[str, Any] = field(default_factory=dict)
    data_fingerprint: str = "none"
    validation: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)
    model_id: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created_at: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def is_ensemble(self) -> bool:
        """Whether the model file holds several models."""
        return self.combined is not None and self.combined.method == "ensemble"


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one image.

    Args:
        predicted_class: name of the most probable class.
        predicted_index: index of that class.
        confidence: probability of that class.
        probabilities: `float32 [K]`, in the order of the bundle's class names.
        predicted_classes: of a multi-label bundle, the classes with a probability of 0.5 and more, the most probable
            first; else empty.
    """

    predicted_class: str
    predicted_index: int
    confidence: float
    probabilities: npt.NDArray[np.float32]
    predicted_classes: tuple[str, ...] = ()


class Bundle:
    """An opened bundle. The model is loaded on first use."""

    def __init__(self, path: Path, info: BundleInfo) -> None:
        self.path = path
        self.info = info
        self._is_started = False

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, model_id={self.info.model_id[:12]!r})"

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.path / self.info.model_file

    @property
    def is_onnx(self) -> bool:
        """Whether the model is an ONNX file, which has no Keras model."""
        return self.info.model_file == ONNX_FILE

    @functools.cached_property
    def model(self) -> "keras.Model":
        """`uint8 [B, H, W, C]`, 0-255 -> `float32 [B, K]` probabilities.

        Raises:
            ConfigError: the model is an ONNX file.
        """
        if self.is_onnx:
            raise ConfigError(
                "the model of this bundle is an ONNX file: use Bundle.session, or Bundle.predict. "
                f"Received: {str(self.model_path)!r}"
            )
        import keras

        return keras.saving.load_model(self.model_path, compile=False)

    @functools.cached_property
    def session(self) -> Any:
        """The ONNX model in ONNX Runtime on the CPU, an `onnxruntime.InferenceSession`; see `onnx_file`.

        Raises:
            ConfigError: the model is a Keras file.
        """
        if not self.is_onnx:
            raise ConfigError(
                "the model of this bundle is a Keras file: use Bundle.model, or Bundle.predict. "
                f"Received: {str(self.model_path)!r}"
            )
        return open_session(self.model_path)

    @functools.cached_property
    def declared(self) -> Declared:
        """What the ONNX file declares; does not load ONNX Runtime."""
        return declared(self.model_path)

    @property
    def fixed_batch(self) -> int | None:
        """Images per call, where the model takes only this many; None: any number."""
        return self.declared.batch_size if self.is_onnx else None

    @property
    def num_features(self) -> int:
        """D, the number of features before the head, as the model file says; does not load Keras.

        Raises:
            BundleError: the model file does not say, or it is an ensemble, which has none.
        """
        if self.info.is_ensemble:
            raise BundleError(
                "an ensemble gives no features, since those of its members have nothing in common; take one of its "
                f"members. Received: {str(self.path)!r}"
            )
        if not self.is_onnx:
            return _keras_features(self.model_path)
        count = self.declared.num_features
        if count is None:
            raise BundleError(
                "this bundle has no features output of known size; import it with --features-node NAME. "
                f"Received: {str(self.path)!r}"
            )
        return count

    @overload
    def predict(self, image: Image) -> Prediction: ...

    @overload
    def predict(self, image: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...

    def predict(self, image: Image | list[Any] | tuple[Any, ...]) -> Prediction | list[Prediction]:
        """Class, confidence and probabilities of an image, or of each image of a batch.

        Args:
            image: a path or URI, the bytes of a file, a file opened in binary mode, a PIL image, or an array of pixels
                in 0-255; or a list or tuple of any of these, of any length. Of any size, resized as in training.

        Returns:
            A `Prediction`; for a list or tuple a list of them, in its order.

        Raises:
            ConfigError: this is no image: a wrong type, or an array of a wrong dtype, shape or range; or the model has
                no classes.
            FileNotFoundError, PermissionError, ServiceError: a file cannot be read.
            ImageError: a file cannot be decoded. An error of one image is an error of the batch; it says which one.
        """
        if isinstance(image, list | tuple):
            return self._predict(image)
        return self._predict([image])[0]

    def _predict(self, images: Sequence[Image]) -> list[Prediction]:
        check_has_classes(self.info)
        size, predictions = PREDICT_BATCH, list[Prediction]()
        for start in range(0, len(images), size):
            pixels = [self._input(images, number) for number in range(start, min(start + size, len(images)))]
            predictions.extend(self._prediction(row) for row in self._probabilities(np.stack(pixels)))
        return predictions

    def _input(self, images: Sequence[Image], number: int) -> Pixels:
        place = f"images[{number}]: " if len(images) > 1 else ""
        return input_pixels(images[number], self.info.spec, place=place)

    def _probabilities(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        with contextlib.nullcontext() if self._is_started else starting_quietly():
            probabilities = self._run(pixels)
        self._is_started = True
        return probabilities

    def _run(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        if not self.is_onnx:
            return np.asarray(self.model(pixels, training=False))
        size = session_batch(self.session) or len(pixels)
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        return np.concatenate([run_session(self.session, part, [PROBABILITIES])[0] for part in parts])

    def _prediction(self, probabilities: npt.NDArray[np.float32]) -> Prediction:
        index, names = int(probabilities.argmax()), self.info.class_names
        ranked = np.argsort(-probabilities, kind="stable") if self.info.multi_label else ()
        reached = tuple(names[code] for code in ranked if probabilities[code] >= DEFAULT_THRESHOLD)
        return Prediction(names[index], index, float(probabilities[index]), probabilities, reached)


def check_has_classes(info: BundleInfo) -> None:
    """Raises ConfigError for a bundle without classes, which cannot classify."""
    if not info.class_names:
        raise ConfigError(
            "this bundle gives features and no classes; train a head on it: mnist-dist train --backbone BUNDLE. "
            f"Received: {info.backbone}, class_names=[]"
        )


def write_bundle(
    path: Path,
    model: "keras.Model",
    info: BundleInfo,
    *,
    history: Iterable[Epoch] | None = (),
    calibration: "pa.Table | None" = None,
    extra: Mapping[str, bytes] | None = None,
) -> BundleInfo:
    """Writes a bundle to a temporary folder beside `path` and renames it when it is complete.

    To publish it elsewhere: `store.upload_folder(path, uri, last="bundle.json")`.

    Args:
        path: the local folder to create; must not hold a finished bundle.
        model: `uint8 [B, H, W, C]`, 0-255 -> probabilities, in float32; synchronised BatchNorm is switched off in it.
        info: the bundle's description; the model file, id, versions and time are filled in here.
        history: the epochs of the training; None leaves the file out.
        calibration: held-out images for engine checks and int8; None leaves the file out.
        extra: further files, by name.

    Returns:
        The info as written.

    Raises:
        BundleError: the path is in use, or the model does not fit the class names, the spec or the float32 policy.
    """
    _check_model(model, info)
    files = dict(extra or {}) if history is None else {HISTORY_FILE: history_csv(history), **(extra or {})}
    with _new_folder(path, files, calibration) as folder:
        _unsynchronize(model)
        model.save(folder / KERAS_FILE)
        return _write_info(folder, replace(info, model_file=KERAS_FILE), ("keras", "tensorflow", "numpy"))


def write_model_bundle(
    path: Path,
    model_file: Path,
    info: BundleInfo,
    *,
    calibration: "pa.Table | None" = None,
    extra: Mapping[str, bytes] | None = None,
) -> BundleInfo:
    """Writes a bundle from a finished model file, as `write_bundle` does from a Keras model in memory.

    Args:
        path: the local folder to create; must not hold a finished bundle.
        model_file: `.onnx` or `.keras`, which is copied; see `onnx_file` for what an ONNX file must be.
        info: the bundle's description; the model file, id, versions and time are filled in here.
        calibration: images of the model's domain for engine checks and int8; None leaves the file out.
        extra: further files, by name.

    Returns:
        The info as written.

    Raises:
        BundleError: the path is in use, class names repeat, or an ONNX file does not fit the class names or the spec. A
            Keras file is not looked at: Keras stays out of the process that writes the bundle.
    """
    if len(set(info.class_names)) != len(info.class_names):
        raise BundleError(f"class names must be distinct. Received: {list(info.class_names)[:20]}")
    is_onnx = model_file.suffix == ".onnx"
    name, packages = (ONNX_FILE, ("onnx", "numpy")) if is_onnx else (KERAS_FILE, ("keras", "tensorflow", "numpy"))
    if is_onnx:
        check_onnx(model_file, spec=info.spec, num_classes=len(info.class_names))
    with _new_folder(path, extra or {}, calibration) as folder:
        shutil.copyfile(model_file, folder / name)
        return _write_info(folder, replace(info, model_file=name), packages)


@contextlib.contextmanager
def _new_folder(path: Path, files: Mapping[str, bytes], calibration: "pa.Table | None") -> Iterator[Path]:
    """A temporary folder with these files, which becomes `path` at the end; an error leaves nothing."""
    _check_free(path, leftovers=files)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        if calibration is not None:
            _write_parquet(calibration, temporary / CALIBRATION_FILE)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)  # leftovers of an interrupted copy: `_check_free` saw no bundle
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_info(folder: Path, info: BundleInfo, packages: Sequence[str]) -> BundleInfo:
    """Writes `MLmodel` and `bundle.json`, and returns the latter's content."""
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    model_id = _sha256(folder / info.model_file)
    info = replace(info, model_id=model_id, versions=_versions(packages), created_at=created_at)
    (folder / MLMODEL_FILE).write_bytes(mlmodel(_described(info, folder / info.model_file)))
    (folder / BUNDLE_FILE).write_bytes(documents.encode(info))
    return info


def _described(info: BundleInfo, model_file: Path) -> Described:
    """What `MLmodel` says of the model."""
    pixels = Tensor(name=IMAGE, dtype="uint8", shape=(None, *info.spec.shape))
    output = (PROBABILITIES, len(info.class_names)) if info.class_names else (FEATURES, None)
    probabilities = Tensor(name=output[0], dtype="float32", shape=(None, output[1]))
    is_onnx = info.model_file == ONNX_FILE
    return Described(
        model_file=info.model_file,
        model_id=info.model_id,
        created_at=info.created_at,
        versions=info.versions,
        size_bytes=model_file.stat().st_size,
        class_names=info.class_names,
        declared=declared(model_file) if is_onnx else Declared(inputs=(pixels,), outputs=(probabilities,)),
    )


def load_bundle(uri: str | os.PathLike[str], *, store: Store = ANYWHERE) -> Bundle:
    """Opens a finished bundle and checks its model file against the recorded sha256.

    Args:
        uri: a folder, or a bucket prefix, which is copied to a temporary folder first.
        store: the store that holds it.

    Raises:
        BundleError: there is no bundle, it is unfinished or damaged, or its format is newer.
    """
    requested = os.fspath(uri)
    path = _download(requested, store) if is_remote(requested) else Path(absolute(requested))
    info = _read_info(path, requested=requested, store=store)
    model_file = path / info.model_file
    digest = _sha256(model_file) if model_file.is_file() else "no such file"
    if digest != info.model_id:
        raise BundleError(
            f"{info.model_file} in {requested} is not the file that the bundle was written with: "
            f"expected sha256 {info.model_id}. Received: {digest}"
        )
    return Bundle(path, info)


def read_bundle_info(uri: str, *, store: Store = ANYWHERE) -> BundleInfo:
    """Reads `bundle.json` alone; the model file is not checked.

    Args:
        uri: a folder or a bucket prefix.
        store: the store that holds it.

    Raises:
        BundleError: there is no bundle, it is unfinished, or its format is newer.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    try:
        data = store.read_bytes(join(absolute(uri), BUNDLE_FILE))
    except FileNotFoundError as err:
        raise _no_bundle(uri, store) from err
    return _decode_info(data, requested=uri)


def _download(uri: str, store: Store) -> Path:
    path = Path(tempfile.mkdtemp(prefix="mnist_dist-bundle-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # only then: engines may read the files until the end
    try:
        store.download_folder(uri, path)
    except FileNotFoundError as err:
        raise _no_bundle(uri, store) from err
    return path


def _no_bundle(requested: str, store: Store) -> BundleError:
    """The error for a folder without `bundle.json`, which says what is there and how it becomes a bundle."""
    uri = absolute(requested)
    level = _level_of(uri, store)
    names = {*level.folders, *level.files} if level is not None else set[str]()
    if "bundle" in names and store.exists(join(uri, "bundle", BUNDLE_FILE)):
        hint = f" (did you mean {join(requested, 'bundle')}?)"
    else:
        hint = _import_hint(requested, names) or what_is_there(uri, store=store)
    if level is None:
        is_file = store.exists(uri)
        why = "a bundle is a folder, no file" if is_file else "the bundle's folder does not exist"
        return BundleError(f"{why}{hint}. Received: {requested!r}")
    why = "is unfinished" if names & {KERAS_FILE, ONNX_FILE} else "is not a bundle"
    return BundleError(f"the folder {why}: it has no {BUNDLE_FILE}{hint}. Received: {requested!r}")


def _level_of(uri: str, store: Store) -> Level | None:
    try:
        return store.list_level(uri, max_names=_MAX_NAMES)
    except (OSError, StorageError):
        return None


def _import_hint(requested: str, names: Collection[str]) -> str:
    """How a foreign model becomes a bundle, where it seems to be one."""
    marks = {"saved_model.pb", "config.json", *(f"model{suffix}" for suffix in FOREIGN_SUFFIXES)}
    if not requested.lower().endswith(FOREIGN_SUFFIXES) and not marks & set(names):
        return ""
    return f"; a model from elsewhere becomes one by: mnist-dist import {requested} --output BUNDLE"


def _read_info(path: Path, *, requested: str, store: Store) -> BundleInfo:
    file = path / BUNDLE_FILE
    if not file.is_file():
        raise _no_bundle(requested, store)
    return _decode_info(file.read_bytes(), requested=requested)


def _decode_info(data: bytes, *, requested: str) -> BundleInfo:
    file = join(requested, BUNDLE_FILE)
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError) as err:
        raise BundleError(f"{file} is not JSON with a format_version: {err!r}. Received: {requested!r}") from err
    if version != FORMAT_VERSION:
        raise BundleError(
            f"this mnist_dist reads bundles of format {FORMAT_VERSION}; upgrade it to read newer ones. "
            f"Received: format_version={version} in {requested!r}"
        )
    try:
        info = documents.decode(data, BundleInfo, uri=file)
    except DataError as err:
        raise BundleError(f"{err}. Received: {requested!r}") from err
    if not info.model_id:
        raise BundleError(f"{file} has no model_id, the sha256 of {info.model_file}. Received: {requested!r}")
    return info


def _num_imported_features(layers: Sequence[Mapping[str, Any]]) -> int:
    """D, from the layers of the network of an imported model."""
    names = {layer["config"]["name"]: layer for layer in layers}
    if FEATURES not in names:
        raise BundleError(f"{NO_FEATURES}. Received: a network of {', '.join(names)}")
    return int(names[FEATURES]["inbound_nodes"][0]["args"][0]["config"]["shape"][-1])


def _keras_features(file: Path) -> int:
    with zipfile.ZipFile(file) as archive:
        layers = json.loads(archive.read("config.json"))["config"]["layers"]
    network = next((layer for layer in layers if layer["config"]["name"] == NETWORK_LAYER), None)
    if network is not None:
        return _num_imported_features(network["config"]["layers"])
    shapes = {layer["config"]["name"]: (layer.get("build_config") or {}).get("input_shape") for layer in layers}
    for name in ("hidden", "logits"):  # dropout, which may stand before them, keeps the number
        shape = shapes.get(name)
        if shape is not None:
            return int(shape[-1])
    raise BundleError(
        f"{file.name} has no layer hidden or logits whose input is known. Received: layers {', '.join(shapes)}"
    )


def check_output(output: str, *, beside: Sequence[str] = ()) -> None:
    """Checks that a bundle may be written to a folder or bucket prefix.

    Args:
        output: absolute URI.
        beside: names of files that its writer puts beside those of every bundle.

    Raises:
        ConfigError: it holds other files; in a bucket, those of an interrupted upload do not count.
    """
    names = {entry.uri.removeprefix(f"{output}/") for entry in ANYWHERE.scan_entries(output)}
    others = sorted(names - set((*_FILES, *beside) if is_remote(output) else ()))
    if others:
        raise ConfigError(f"the folder of a bundle must be new or empty. Received: {output!r}, with {others[:5]}")


def upload_bundle(folder: Path, output: str, *, beside: Sequence[str] = ()) -> None:
    """Writes a finished local bundle to where `check_output` has found room, `bundle.json` last."""
    ANYWHERE.delete_leftovers(output)
    for name in (*_FILES, *beside) if is_remote(output) else ():  # left by an interrupted upload
        ANYWHERE.delete_tree(join(output, name))
    ANYWHERE.upload_folder(folder, output, last=BUNDLE_FILE)


def _check_free(path: Path, *, leftovers: Iterable[str]) -> None:
    if (path / BUNDLE_FILE).exists():
        raise BundleError(f"a finished bundle is never overwritten. Received: {str(path)!r}")
    known = {*_FILES, *leftovers}
    unknown = sorted({entry.name for entry in path.glob("*")} - known)
    if unknown or path.is_file():
        raise BundleError(f"the folder of a bundle must be new or empty. Received: {str(path)!r}, with {unknown}")


def _check_model(model: "keras.Model", info: BundleInfo) -> None:
    class_names, spec = info.class_names, info.spec
    expected = ((None, spec.height_px, spec.width_px, spec.channels), (None, len(class_names)))
    shapes = (tuple(model.input_shape), tuple(model.output_shape))
    if expected != shapes or len(set(class_names)) != len(class_names):
        raise BundleError(
            f"the model's input and output shapes are {expected} for this spec and {len(class_names)} distinct class "
            f"names. Received: {shapes}, class_names={list(class_names)[:20]}"
        )
    policies = sorted({layer.dtype_policy.name for layer in all_layers(model)} - {"float32", "uint8"})
    if policies:
        raise BundleError(
            f"a bundle's model is saved with the float32 policy: build it in float32 and set the trained weights. "
            f"Received: layers with the policies {policies}"
        )


def _unsynchronize(model: "keras.Model") -> None:
    """Switches synchronised BatchNorm off: only TensorFlow runs it, and a finished model does not train."""
    for layer in all_layers(model):
        if getattr(layer, "synchronized", False):
            layer.synchronized = False


def all_layers(model: "keras.Model") -> "list[keras.layers.Layer]":
    """All layers of a model, including those of nested models."""
    nested = [all_layers(layer) if hasattr(layer, "layers") else [layer] for layer in model.layers]
    return [layer for layers in nested for layer in layers]


def _write_parquet(table: "pa.Table", path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions(packages: Iterable[str]) -> dict[str, str]:
    import platform

    import mnist_dist

    versions = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "mnist_dist": mnist_dist.__version__, **versions}
