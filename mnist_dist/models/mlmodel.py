"""The file `MLmodel` of a bundle: how MLflow loads the model, without this package and without MLflow to write it.

Owns: its content, with the flavors `keras` or `onnx` and, for `mlflow.pyfunc.load_model`, `python_function`. Does not
own: the bundle (`bundle.py`). The file follows from the bundle alone; the id that MLflow draws at random is the
beginning of the model id.

Source: mlflow 3.17, `models/model.py` (the fields), `keras/load.py` and `onnx/__init__.py` (which of them are read).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mnist_dist.models.onnx_file import Declared, Tensor

MLMODEL_FILE = "MLmodel"
UUID_DIGITS = 32


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the file says of a bundle."""

    model_file: str
    model_id: str
    created_at: str
    """ISO 8601, UTC."""
    versions: Mapping[str, str]
    """Of `python` and of the package that wrote the model file."""
    size_bytes: int
    """Of the model file."""
    class_names: Sequence[str]
    declared: Declared
    """Inputs and outputs."""


def mlmodel(bundle: Described) -> bytes:
    """The file's content, YAML."""
    import yaml

    created = bundle.created_at.replace("T", " ").removesuffix("+00:00")
    document = {
        "flavors": _flavors(bundle),
        "metadata": {"class_names": list(bundle.class_names), "model_id": bundle.model_id},
        "model_size_bytes": bundle.size_bytes,
        "model_uuid": bundle.model_id[:UUID_DIGITS],
        "signature": {
            "inputs": _schema(bundle.declared.inputs, named=False),
            "outputs": _schema(bundle.declared.outputs, named=len(bundle.declared.outputs) > 1),
            "params": None,
        },
        "utc_time_created": created,
    }
    return bytes(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, encoding="utf-8"))


def _flavors(bundle: Described) -> dict[str, Any]:
    """Which of MLflow's modules load the model, and their options."""
    file, versions = PurePath(bundle.model_file), bundle.versions
    python = versions["python"]
    if file.suffix == ".onnx":
        return {
            "onnx": {"data": file.name, "onnx_version": versions["onnx"], "code": None},
            "python_function": {"loader_module": "mlflow.onnx", "data": file.name, "python_version": python},
        }
    return {  # mlflow.keras adds the suffix itself, and takes the folder for the data of its pyfunc.
        "keras": {"data": file.stem, "keras_version": versions["keras"], "save_exported_model": False},
        "python_function": {"loader_module": "mlflow.keras", "python_version": python},
    }


def _schema(tensors: Sequence[Tensor], *, named: bool) -> str:
    """MLflow's JSON of tensors. A single one without a name may be given as an array (`_enforce_tensor_schema`)."""
    return json.dumps(
        [
            {
                **({"name": tensor.name} if named else {}),
                "type": "tensor",
                "tensor-spec": {
                    "dtype": tensor.dtype,
                    "shape": [-1 if size is None else size for size in tensor.shape],
                },
            }
            for tensor in tensors
        ]
    )
