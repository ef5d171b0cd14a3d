"""Foreign files of Keras: what they may hold, and how they are loaded.

Owns: the check of a `.keras` or legacy `.h5` file before Keras sees it, and loading in float32. Does not own: what the
model is (`keras_models`).

Contract: nothing in a file is executed. A file names classes; only those of Keras itself that compute on tensors are
allowed, so no Lambda, no class of another package, no layer that reads further files. Keras' own safe mode comes after
that, and refuses links, virtual datasets and bombs inside HDF5.
"""

import contextlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras

from mnist_dist.errors import ConfigError, first_line
from mnist_dist.models.bundle import all_layers

HDF5 = (".h5", ".hdf5")
CONFIG_FILE, METADATA_FILE = "config.json", "metadata.json"
MAX_CONFIG_BYTES = 2**26
"""A configuration of 2,000 layers has 2 MB."""
MAX_EXPANSION = 100
"""Weights do not compress; zeros do, to a thousandth."""
NEVER = frozenset(
    {"Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "FeatureSpace"}
    | {"StringLookup", "IntegerLookup", "IndexLookup", "TextVectorization"}
)
"""Classes of Keras that run code from the file, or read files that it names."""
VALUES = frozenset({"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"})
"""What Keras writes for arguments that are no JSON values."""
NAMESPACES = ("layers", "initializers", "regularizers", "constraints", "dtype_policies", "random", "activations")
ONLY_TRAINING = ("optimizers", "losses", "metrics")
"""Namespaces of what a nested compiled model holds, too."""
HALF = frozenset({"mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64"})
INSTEAD = "Export the model in your own code (`model.export(FOLDER)`) and import that SavedModel, or an ONNX file"


def load_keras(file: Path) -> tuple[keras.Model, bool]:
    """Loads a foreign model.

    Args:
        file: a `.keras` file, or a whole model in a legacy `.h5` or `.hdf5` file.

    Returns:
        The model in float32, not compiled, and whether it was in another precision.

    Raises:
        ConfigError: the file holds something else than a model of built-in layers, or Keras cannot load it.
    """
    check_classes(_read_config(file), file.name)
    try:
        with _as_keras_names_it(file) as named:
            model = keras.saving.load_model(named, compile=False, safe_mode=True)
    except Exception as error:  # The border: a foreign file fails in as many ways as Keras has.
        raise ConfigError(f"Keras cannot load {file.name}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, keras.Model):
        raise ConfigError(f"{file.name} holds no model. Received: {type(model).__name__}")
    return _in_float32(model, file.name)


@contextlib.contextmanager
def _as_keras_names_it(file: Path) -> Iterator[Path]:
    """The file, under a name whose suffix Keras knows: it compares letter by letter."""
    if file.suffix == file.suffix.lower():
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="mnist_dist-keras-") as folder:
        link = Path(folder, f"model{file.suffix.lower()}")
        link.symlink_to(file.absolute())
        yield link


def check_classes(config: Any, name: str) -> None:
    """Checks that a configuration names nothing but classes of Keras that compute on tensors.

    Args:
        config: the JSON of a model, as in `config.json` or in `model_config`.
        name: of the file, for the message.

    Raises:
        ConfigError: it names something else; the message says which layer.
    """
    try:
        for layer, entry in _objects({**config, "compile_config": None}, "model"):
            reason = _reason_against(entry)
            if reason is not None:
                raise ConfigError(f"{name} is refused: layer {layer!r} {reason}. {INSTEAD}")
    except RecursionError as error:
        raise ConfigError(f"{name} is refused: its configuration is nested too deeply") from error


def _read_config(file: Path) -> Any:
    is_hdf5 = file.suffix.lower() in HDF5
    try:
        config = json.loads(_hdf5_config(file) if is_hdf5 else _zip_config(file))
    except ConfigError:
        raise
    except Exception as error:  # The border: zip, HDF5 and JSON each have errors of their own.
        kind = "HDF5 file" if is_hdf5 else "`.keras` file"
        raise ConfigError(
            f"{file.name} is no {kind} of a model: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file.name} has no configuration of a model. Received: {str(config)[:80]}")
    return config


def _zip_config(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        if CONFIG_FILE not in sizes:
            raise ConfigError(f"{file.name} is no `.keras` file of a model: it has no {CONFIG_FILE}")
        if sizes[CONFIG_FILE] > MAX_CONFIG_BYTES or sum(sizes.values()) > MAX_EXPANSION * file.stat().st_size:
            raise ConfigError(
                f"{file.name} is refused: its members become {sum(sizes.values()):,} bytes. "
                f"Received: a file of {file.stat().st_size:,} bytes"
            )
        if METADATA_FILE in sizes and sizes[METADATA_FILE] <= MAX_CONFIG_BYTES:
            _check_version(json.loads(archive.read(METADATA_FILE)), file.name)
        return archive.read(CONFIG_FILE)


def _check_version(metadata: Any, name: str) -> None:
    version = str(metadata.get("keras_version", "")) if isinstance(metadata, dict) else ""
    if version.startswith("2."):
        raise ConfigError(
            f"{name} was written by Keras 2, whose `.keras` files Keras 3 does not load: save it there as `.h5`, or "
            f"with `tf.saved_model.save`. Received: keras_version={version}"
        )


def _hdf5_config(file: Path) -> bytes | str:
    with h5py.File(file, "r") as archive:
        config = archive.attrs.get("model_config")
        if config is None:
            raise ConfigError(
                f"{file.name} holds weights only: build the model in your own code, load them, and save the whole "
                f"model as `.keras`. Received: an HDF5 file without model_config"
            )
        text: bytes | str = config
        return text


def _objects(value: Any, layer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything in a configuration that Keras would make an object of, with the name of its layer."""
    if isinstance(value, dict):
        if "class_name" in value:
            inner = value.get("config")
            named = inner.get("name") if isinstance(inner, dict) else None
            layer = named if isinstance(named, str) else layer
            yield layer, value
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _objects(entry, layer)


def _reason_against(entry: dict[str, Any]) -> str | None:
    """Why an object is not allowed; None: it is."""
    name, module, registered = entry["class_name"], entry.get("module"), entry.get("registered_name")
    if not isinstance(name, str) or not isinstance(module, str | None):
        return f"has the class {name!r} of the module {module!r}"
    if name in VALUES:
        return None
    if name in NEVER:
        return f"is a {name}, which brings code or files along"
    if name == "function":
        return None if hasattr(keras.activations, str(entry.get("config"))) else f"uses the function {entry['config']}"
    if registered not in (None, name):
        return f"is a custom class, {registered}"
    if module is None:
        return None if _is_known(name) else f"is of the unknown class {name}"
    return None if _is_in(module, name) else f"is of the class {module}.{name}, which is none of Keras' layers"


def _is_known(name: str) -> bool:
    """Whether a legacy file may name this class, without a module."""
    spaces = [getattr(keras, space) for space in (*NAMESPACES, *ONLY_TRAINING)]
    return name in ("Functional", "Model") or any(
        isinstance(getattr(each, name, None), type) for each in (keras, *spaces)
    )


def _is_in(module: str, name: str) -> bool:
    """Whether Keras has this class in this module, and it computes; nothing is imported."""
    package, _, space = module.partition(".")
    if package != "keras":
        return False
    if space in ("", "models", *NAMESPACES, *ONLY_TRAINING):
        return isinstance(getattr(getattr(keras, space) if space else keras, name, None), type)
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return isinstance(found, type) and issubclass(found, keras.Operation)


def _in_float32(model: keras.Model, name: str) -> tuple[keras.Model, bool]:
    policies = {layer.dtype_policy.name for layer in all_layers(model)}
    quantized = sorted(policy for policy in policies if "_from_" in policy)
    if quantized:
        raise ConfigError(f"{name} is quantized: import the model before that. Received: layers of {quantized}")
    if not policies & HALF:
        return model, False
    config = _with_float32(keras.saving.serialize_keras_object(model))
    converted = keras.saving.deserialize_keras_object(config, safe_mode=True)
    converted.set_weights(model.get_weights())
    return converted, True


def _with_float32(value: Any) -> Any:
    """A configuration in which every data type of `HALF` is float32."""
    if isinstance(value, list):
        return [_with_float32(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_name") == "DTypePolicy" and value["config"]["name"] in HALF:
        return {**value, "config": {"name": "float32"}}
    return {key: _float32_of(each) if key == "dtype" else _with_float32(each) for key, each in value.items()}


def _float32_of(dtype: Any) -> Any:
    return ("float32" if dtype in HALF else dtype) if isinstance(dtype, str) else _with_float32(dtype)
