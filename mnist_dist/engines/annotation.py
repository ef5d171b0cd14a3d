"""What a converted file says about itself: the classes, the model, and how an image becomes its input.

Owns: these entries, in ONNX's `metadata_props` and OpenVINO's `rt_info`; the other formats have no place for them. A
model in int8 also says how many of its convolutions compute in float32.
Does not own: the files (`conversion`). Imports `onnx` or `openvino` when it is called, in the processes that convert.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnist_dist.engines.formats import FORMATS, openvino_core
from mnist_dist.models.bundle import BundleInfo

FLOAT32_CONVOLUTIONS = "float32_convolutions"


def entries(info: BundleInfo) -> dict[str, str]:
    """The entries of a file: `class_names` and `image_spec` as JSON, and `model_id`."""
    return {
        "class_names": json.dumps(info.class_names, ensure_ascii=False),
        "image_spec": json.dumps(asdict(info.spec)),
        "model_id": info.model_id,
    }


def annotate(folder: Path, format: str, info: BundleInfo) -> None:
    """Writes the entries into a converted file, where its format has a place for them.

    Args:
        folder: the folder of the file.
        format: a key of `FORMATS`.
        info: the description of the bundle.
    """
    if format == "onnx":
        _annotate_onnx(folder / FORMATS[format].file, info)
    elif format == "openvino":
        _annotate_openvino(folder, info)


def note_float32_convolutions(model: Any, count: int) -> None:
    """Writes into a model of OpenVINO in int8 how many convolutions compute in float32."""
    model.set_rt_info(str(count), [FLOAT32_CONVOLUTIONS])


def float32_convolutions(folder: Path) -> int:
    """What `note_float32_convolutions` wrote into the model of this folder; 0: nothing."""
    model = openvino_core().read_model(folder / FORMATS["openvino"].file)
    path = [FLOAT32_CONVOLUTIONS]
    return int(model.get_rt_info(path).astype(str)) if model.has_rt_info(path) else 0


def _annotate_onnx(file: Path, info: BundleInfo) -> None:
    import onnx

    model = onnx.load(file)
    known = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, known | entries(info))
    onnx.save(model, file)


def _annotate_openvino(folder: Path, info: BundleInfo) -> None:
    row, changed = FORMATS["openvino"], folder.with_name(f"{folder.name}.annotated")
    model = openvino_core().read_model(folder / row.file)
    for name, value in entries(info).items():
        model.set_rt_info(value, [name])
    changed.mkdir()
    save_openvino(model, changed)  # not in place: OpenVINO reads weights only when it needs them
    for name in (row.file, *row.others):
        (changed / name).replace(folder / name)
    shutil.rmtree(changed)


def save_openvino(model: Any, folder: Path) -> None:
    """Saves a model of OpenVINO with all digits of its weights."""
    import openvino

    openvino.save_model(model, folder / FORMATS["openvino"].file, compress_to_fp16=False)
