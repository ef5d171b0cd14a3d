"""timm as a source: a named architecture, or a folder as timm saves it.

Owns: building the model with its weights, and what its `pretrained_cfg` says. Does not own: the ONNX file and the
reference (`torch_export`), or reading checkpoints (`checkpoints`).
"""

# K = classes

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist import documents
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, WeightsError, first_line, suggestion
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.checkpoints import State, read_checkpoint
from mnist_dist.importing.foreign import Facts, Foreign
from mnist_dist.importing.torch_export import (
    Loaded,
    check_installed,
    downloaded,
    exported,
    fill_weights,
    input_sides,
    normalization,
    num_rows,
)

if TYPE_CHECKING:
    import torch

TIMM = "timm:"
CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_REFUSED_ARGUMENTS = (
    "pretrained",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
)
"""Arguments of timm's `create_model` that are no part of an architecture."""
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True, kw_only=True)
class TimmFile:
    """The fields of `config.json` that timm's own loader reads."""

    architecture: str
    num_classes: int | None = None
    label_names: list[str] | None = None
    label_descriptions: dict[str, str] | list[str] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Named:
    """What is known of a timm model before it is built."""

    name: str
    cfg: Mapping[str, Any]
    """`pretrained_cfg`."""
    arguments: Mapping[str, Any]
    checkpoint: Path | None
    labels: tuple[str, ...] | None = None


def open_timm(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """`timm:NAME`, or a folder with `config.json` and weights, as timm saves it.

    Args:
        job: the import; `checkpoint` counts before the weights of the name or folder.
        scratch: a folder, for the ONNX file.
        report: unused; torch does not say how far it is.

    Raises:
        ConfigError: torch or timm is missing, or there is no such model.
        WeightsError: the weights cannot be downloaded or read, or are another model's.
        MnistDistError: torch cannot write the model as ONNX.
    """
    return exported("timm", load_timm, job, scratch)


def load_timm(job: ImportJob) -> Loaded:
    """Builds the model of a job; see `open_timm`."""
    if not job.source.startswith(TIMM):
        _read_file(Path(job.source))  # a folder of transformers needs no torch, but another message
    check_installed("timm", job)
    logging.getLogger("timm").setLevel(logging.ERROR)
    named = _named(job) if job.source.startswith(TIMM) else _in_folder(job)
    module, why = _module(named, job)
    data = _transform_arguments(named, module, job)
    height, width = (int(side) for side in data["input_size"][1:])
    channels = int(data["input_size"][0])
    classes = None if job.backbone_only else int(module.num_classes)
    if classes == 0:
        raise ConfigError(f"the model has no classes: import it with --backbone-only. Received: {job.source!r}")
    labels, sentences = _labels(named, classes)
    import timm.data

    return Loaded(
        name=named.name,
        module=module.eval(),
        transform=timm.data.create_transform(**data, is_training=False),
        facts=Facts(
            class_names=labels,
            height_px=height,
            width_px=width,
            is_size_fixed=True,
            channels=channels,
            resampling="pillow",
            antialias=True,
            crop_rounding="even",
            num_outputs=classes,
            why=(*why, *sentences),
            **_geometry(data),
            **normalization(data["mean"], data["std"], channels),
        ),
    )


def _named(job: ImportJob) -> _Named:
    import timm

    name = job.source.removeprefix(TIMM)
    _check_name(name)
    try:
        cfg = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError, KeyError) as err:  # an unknown tag
        raise ConfigError(f"timm has no such weights: {first_line(err)}. Received: {job.source!r}") from None
    return _Named(
        name=name,
        cfg={} if cfg is None else cfg.to_dict(),
        arguments={},
        checkpoint=None if job.checkpoint is None else Path(job.checkpoint),
    )


def _read_file(folder: Path) -> TimmFile:
    """`config.json` of a folder."""
    path = folder / CONFIG_FILE
    content = documents.decode(path.read_bytes(), dict, uri=str(path))
    if "architecture" not in content:
        raise ConfigError(
            f"{path} names no architecture of timm. A model of transformers is imported as ONNX: `optimum-cli export "
            f"onnx` writes it into such a folder. Received: {', '.join(map(str, content)) or 'no field'}"
        )
    if "pretrained_cfg" not in content:  # older files hold its fields on their own level
        content |= {"pretrained_cfg": dict(content)}
    return documents.decode(documents.encode(content), TimmFile, uri=str(path))


def _in_folder(job: ImportJob) -> _Named:
    folder = Path(job.source)
    file = _read_file(folder)
    _check_name(file.architecture)
    refused = [name for name in file.model_args if name.startswith(_REFUSED_ARGUMENTS)]
    if refused:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: model_args may describe the architecture only. Received: {', '.join(refused)}"
        )
    found = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), folder / WEIGHTS_FILES[0])
    stated = file.pretrained_cfg.get("num_classes") if file.num_classes is None else file.num_classes
    return _Named(
        name=file.architecture,
        cfg=file.pretrained_cfg | {"num_classes": stated},
        arguments=file.model_args,
        checkpoint=found if job.checkpoint is None else Path(job.checkpoint),
        labels=_folder_labels(file),
    )


def _check_name(name: str) -> None:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        hint = suggestion(name, timm.list_models())
        raise ConfigError(f"timm has no such model{hint}; timm.list_models() names them all. Received: {name!r}")


def _module(named: _Named, job: ImportJob) -> tuple["torch.nn.Module", tuple[str, ...]]:
    """The model with its weights, and sentences about it."""
    import timm

    if named.checkpoint is None:
        if not (named.cfg.get("hf_hub_id") or named.cfg.get("url")):
            raise WeightsError(
                f"timm has no weights for this model; give yours with --checkpoint FILE. Received: {job.source!r}"
            )
        module = downloaded(lambda: timm.create_model(named.name, pretrained=True), named.name)
        return _backbone(module, job), ()
    state = read_checkpoint(named.checkpoint)
    arguments, why = _arguments(named, state)
    try:
        module = timm.create_model(named.name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as err:
        raise ConfigError(f"timm cannot build {named.name} ({first_line(err)}). Received: {arguments}") from err
    fill_weights(module, state, name=named.name, path=named.checkpoint)
    return _backbone(module, job), why


def _arguments(named: _Named, state: State) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The architecture that weights are for: their classes and channels; and sentences about it."""
    classifiers, stated = _names(named.cfg.get("classifier")), named.cfg.get("num_classes")
    rows = next((count for name in classifiers if (count := num_rows(state, name)) is not None), None)
    without_head = 0 if classifiers else stated
    arguments = {**named.arguments, "num_classes": without_head if rows is None else rows}
    first = [state[f"{name}.weight"] for name in _names(named.cfg.get("first_conv")) if f"{name}.weight" in state]
    if first and first[0].ndim == 4:
        channels = arguments["in_chans"] = int(first[0].shape[1])
        if channels not in (1, 3):
            raise WeightsError(f"the model takes {channels} channels, not 1 or 3. Received: {str(named.checkpoint)!r}")
    if rows is None or rows == stated:
        return arguments, ()
    return arguments, (f"the checkpoint has {rows} classes, {named.name} usually {stated}",)


def _backbone(module: Any, job: ImportJob) -> Any:
    if job.backbone_only and module.num_classes:
        module.reset_classifier(0)
    return module


def _names(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()


def _transform_arguments(named: _Named, module: Any, job: ImportJob) -> dict[str, Any]:
    """Arguments of timm's transform."""
    import timm.data

    cfg = {**module.pretrained_cfg, **{name: value for name, value in named.cfg.items() if value is not None}}
    data: dict[str, Any] = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    first = _names(cfg.get("first_conv"))
    channels = int(module.get_parameter(f"{first[0]}.weight").shape[1]) if first else int(data["input_size"][0])
    stated = named.arguments.get("img_size") or data["input_size"][1:]
    return data | {"input_size": (channels, *input_sides(job, stated))}


def _geometry(data: Mapping[str, Any]) -> dict[str, Any]:
    """The resize rule of timm's `transforms_imagenet_eval`, as facts."""
    height, width = data["input_size"][1:]
    mode, share = data["crop_mode"], data["crop_pct"] or 0.875
    scaled = math.floor(height / share)
    interpolation = data["interpolation"]
    border = {round(255 * value) for value in data["mean"]}
    if interpolation not in _INTERPOLATIONS:
        raise ConfigError(f"timm's interpolation {interpolation!r} is no fixed filter; choose one with --interpolation")
    found: dict[str, Any] = {"interpolation": interpolation, "resize_px": None}
    if mode == "squash" and share == 1:
        return found | {"resize": "stretch"}
    if mode == "border" and share == 1 and len(border) == 1:
        return found | {"resize": "longest-edge-pad", "pad_value": border.pop()}
    if height == width and mode in ("squash", "center"):
        return found | {"resize": "stretch" if mode == "squash" else "shortest-edge", "resize_px": scaled}
    raise ConfigError(
        f"timm's way to fit images has no counterpart in a bundle; export the model as ONNX and import that with "
        f"--resize. Received: crop_mode={mode!r}, crop_pct={share}, {height} x {width} px"
    )


def _labels(named: _Named, classes: int | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    import timm.data

    if classes is None or named.labels is not None:
        return named.labels, ()
    subset = timm.data.infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return None, ()
    names = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return names, (f"{classes:,} classes: named as those of {subset} (--classes names others)",)


def _folder_labels(file: TimmFile) -> tuple[str, ...] | None:
    names = file.label_names or file.pretrained_cfg.get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    described = file.label_descriptions or file.pretrained_cfg.get("label_descriptions")
    if isinstance(described, dict):
        return tuple(str(described.get(name, name)) for name in names)
    return tuple(names)
