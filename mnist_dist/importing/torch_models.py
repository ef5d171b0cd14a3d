"""timm and torchvision as sources: a named architecture with its weights, written as ONNX by torch.

Owns: building the model, its weights, what timm's `pretrained_cfg` and torchvision's `weights.transforms()` say, the
ONNX file, and the reference: the same model behind its library's own transform. Does not own: reading checkpoints
(`checkpoints`), or the bundle's graph (`onnx_graph`).

A model with random weights is never given: without `--checkpoint`, the library downloads its own.
"""

# N = images, H = height px, W = width px, C = channels, K = classes, D = features

import contextlib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnist_dist import documents
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, MnistDistError, WeightsError, first_line, suggestion
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.as_stated import fitted, is_as_stated, opened
from mnist_dist.importing.checkpoints import State, read_checkpoint
from mnist_dist.importing.foreign import Asked, Facts, Foreign, Values
from mnist_dist.importing.onnx_graph import features_of, num_outputs, read_graph
from mnist_dist.importing.onnx_models import activated

if TYPE_CHECKING:
    import torch
    from PIL import Image

TIMM, TORCHVISION = "timm:", "torchvision:"
OPSET = 18  # the oldest that torch's exporter writes without converting
LOGITS, FEATURES = "logits", "features"
CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_BATCH = 8
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
_NORMALIZES_ITSELF = frozenset({"googlenet", "inception_v3"})
"""Models of torchvision that undo the usual normalisation inside, if built for its weights."""

Transform = Callable[["Image.Image"], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its weights, in inference mode."""

    name: str
    module: "torch.nn.Module"
    """`float32 [N, C, H, W]` -> `float32 [N, K]` logits, or `[N, D]` features."""
    transform: Transform
    """The library's own, from an image to `float32 [C, H, W]`."""
    facts: Facts


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
    return _opened("timm", job, scratch)


def open_torchvision(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """`torchvision:NAME`, or `torchvision:NAME.WEIGHTS` for the transform of other weights than the default ones.

    See `open_timm`.
    """
    return _opened("torchvision", job, scratch)


def run_torch(kind: Literal["timm", "torchvision"], job: ImportJob, images: Sequence[bytes], asked: Asked) -> Values:
    """The original model in torch: `float32 [N, K]` after the activation, or `[N, D]` features.

    Images are prepared by the library's own transform, from Pillow's image. Where flags have changed how images are
    fitted or normalised, they are prepared as asked.
    """
    import torch

    loaded = _load(kind, job)
    prepare = _own_way(loaded) if is_as_stated(asked, loaded.facts) else partial(_as_asked, asked=asked)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            batch = torch.stack([prepare(data) for data in images[start : start + _BATCH]])
            rows.append(loaded.module(batch).double().numpy())
    return activated(np.concatenate(rows), asked)


def _opened(kind: Literal["timm", "torchvision"], job: ImportJob, scratch: Path) -> Foreign:
    _check_nodes(kind, job)
    loaded = _load(kind, job)
    file = scratch / "exported.onnx"
    _export(loaded, file, output=FEATURES if job.backbone_only else LOGITS)
    torch, library = (importlib.import_module(name) for name in ("torch", kind))
    return Foreign(
        kind=kind,
        name=loaded.name,
        file=file,
        facts=_with_outputs(loaded.facts, file, job),
        reference=partial(run_torch, kind, job),
        reference_name=f"{kind} {library.__version__} with torch {torch.__version__}",
    )


def _check_nodes(kind: str, job: ImportJob) -> None:
    """The exported graph has one output, and names that no user knows."""
    if job.output_node is not None:
        raise ConfigError(f"a model of {kind} has one output. Received: --output-node {job.output_node!r}")
    if job.features_node is not None and not (job.backbone_only and job.features_node == FEATURES):
        there = (
            f"{FEATURES!r} with --backbone-only" if job.backbone_only else f"{LOGITS!r}, and what its last layer takes"
        )
        raise ConfigError(
            f"a model of {kind} gives {there}: leave out --features-node, its features are found without. "
            f"Received: --features-node {job.features_node!r}"
        )


def _load(kind: Literal["timm", "torchvision"], job: ImportJob) -> Loaded:
    if kind == "timm" and not job.source.startswith(TIMM):
        _timm_file(Path(job.source))  # a folder of transformers needs no torch, but another message
    for name in ("torch", kind):
        try:
            importlib.import_module(name)
        except ImportError as err:
            raise ConfigError(
                f"{kind} models need torch and {kind}: `pip install torch {kind} onnxscript`, or the extra [torch]. "
                f"Received: {job.source!r} ({first_line(err)})"
            ) from None
    logging.getLogger("timm").setLevel(logging.ERROR)
    return _load_timm(job) if kind == "timm" else _load_torchvision(job)


def _with_outputs(facts: Facts, file: Path, job: ImportJob) -> Facts:
    """With the names of the ONNX file's tensors."""
    graph = read_graph(file)
    if job.backbone_only:
        return replace(facts, features=FEATURES, class_names=None, num_outputs=num_outputs(graph, FEATURES))
    return replace(facts, output=LOGITS, features=features_of(graph, LOGITS))


def _own_way(loaded: Loaded) -> Callable[[bytes], "torch.Tensor"]:
    channels = loaded.facts.channels or 3
    return lambda data: loaded.transform(opened(data, channels=channels))


def _as_asked(data: bytes, *, asked: Asked) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(fitted(data, asked)))


def _export(loaded: Loaded, file: Path, *, output: str) -> None:
    """Writes `float32 [N, C, H, W]` -> `output`."""
    import torch

    facts = loaded.facts
    example = torch.zeros(2, facts.channels or 3, facts.height_px or 1, facts.width_px or 1)
    try:
        with torch.inference_mode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                loaded.module,
                (example,),
                str(file),
                input_names=["pixel_values"],
                output_names=[output],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except Exception as err:  # whatever an architecture makes of the exporter
        raise MnistDistError(
            f"torch cannot write {loaded.name} of {facts.height_px} x {facts.width_px} px as ONNX: {first_line(err)}. "
            f"Export it with your own code, and import that file"
        ) from err


# --- weights ---------------------------------------------------------------------------------------------------------


def _fill(module: "torch.nn.Module", state: State, *, name: str, path: Path) -> None:
    """Loads weights, all of them."""
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as err:  # shapes that differ
        lines = [line.strip() for line in str(err).splitlines()[1:]]
        raise WeightsError(
            f"these are not weights of {name}: {'; '.join(lines[:2])}. Received: {str(path)!r}"
        ) from None
    if missing or unexpected:
        raise WeightsError(
            f"these are not weights of {name}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} have no place ({', '.join(unexpected[:3])}). Received: {str(path)!r}"
        )


def _downloaded(make: Callable[[], "torch.nn.Module"], name: str) -> "torch.nn.Module":
    try:
        return make()
    except Exception as err:  # of the hub's client, urllib or the library
        raise WeightsError(
            f"the weights of {name} cannot be downloaded ({first_line(err)}); give yours with --checkpoint FILE. "
            f"Received: no checkpoint"
        ) from err


def _head(module: "torch.nn.Module") -> str:
    """Name of the last dense layer, or the last convolution of a network without one."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, layer in module.named_modules() if isinstance(layer, kinds)]
    dense = [name for name in names if isinstance(module.get_submodule(name), torch.nn.Linear)]
    return str((dense or names)[-1])


def _rows(state: State, layer: str) -> int | None:
    """Number of outputs of a layer in a checkpoint."""
    weight = state.get(f"{layer}.weight")
    return None if weight is None else int(weight.shape[0])


def _without_head(module: "torch.nn.Module") -> "torch.nn.Module":
    import torch

    name = _head(module)
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, torch.nn.Identity())
    return module


# --- timm ------------------------------------------------------------------------------------------------------------


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
class _Timm:
    """What is known of a timm model before it is built."""

    name: str
    cfg: Mapping[str, Any]
    """`pretrained_cfg`."""
    arguments: Mapping[str, Any]
    checkpoint: Path | None
    labels: tuple[str, ...] | None = None


def _load_timm(job: ImportJob) -> Loaded:
    named = _named_timm(job) if job.source.startswith(TIMM) else _timm_folder(job)
    module, why = _timm_module(named, job)
    data = _timm_data(named, module, job)
    height, width = (int(side) for side in data["input_size"][1:])
    channels = int(data["input_size"][0])
    classes = None if job.backbone_only else int(module.num_classes)
    if classes == 0:
        raise ConfigError(f"the model has no classes: import it with --backbone-only. Received: {job.source!r}")
    labels, sentences = _timm_labels(named, classes)
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
            **_timm_geometry(data),
            **_normalization(data["mean"], data["std"], channels),
        ),
    )


def _named_timm(job: ImportJob) -> _Timm:
    import timm

    name = job.source.removeprefix(TIMM)
    _check_timm(name)
    try:
        cfg = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError, KeyError) as err:  # an unknown tag
        raise ConfigError(f"timm has no such weights: {first_line(err)}. Received: {job.source!r}") from None
    return _Timm(
        name=name,
        cfg={} if cfg is None else cfg.to_dict(),
        arguments={},
        checkpoint=None if job.checkpoint is None else Path(job.checkpoint),
    )


def _timm_file(folder: Path) -> TimmFile:
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


def _timm_folder(job: ImportJob) -> _Timm:
    folder = Path(job.source)
    file = _timm_file(folder)
    _check_timm(file.architecture)
    refused = [name for name in file.model_args if name.startswith(_REFUSED_ARGUMENTS)]
    if refused:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: model_args may describe the architecture only. Received: {', '.join(refused)}"
        )
    found = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), folder / WEIGHTS_FILES[0])
    stated = file.pretrained_cfg.get("num_classes") if file.num_classes is None else file.num_classes
    return _Timm(
        name=file.architecture,
        cfg=file.pretrained_cfg | {"num_classes": stated},
        arguments=file.model_args,
        checkpoint=found if job.checkpoint is None else Path(job.checkpoint),
        labels=_folder_labels(file),
    )


def _check_timm(name: str) -> None:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        hint = suggestion(name, timm.list_models())
        raise ConfigError(f"timm has no such model{hint}; timm.list_models() names them all. Received: {name!r}")


def _timm_module(named: _Timm, job: ImportJob) -> tuple["torch.nn.Module", tuple[str, ...]]:
    """The model with its weights, and sentences about it."""
    import timm

    if named.checkpoint is None:
        if not (named.cfg.get("hf_hub_id") or named.cfg.get("url")):
            raise WeightsError(
                f"timm has no weights for this model; give yours with --checkpoint FILE. Received: {job.source!r}"
            )
        module = _downloaded(lambda: timm.create_model(named.name, pretrained=True), named.name)
        return _timm_backbone(module, job), ()
    state = read_checkpoint(named.checkpoint)
    arguments, why = _timm_arguments(named, state)
    try:
        module = timm.create_model(named.name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as err:
        raise ConfigError(f"timm cannot build {named.name} ({first_line(err)}). Received: {arguments}") from err
    _fill(module, state, name=named.name, path=named.checkpoint)
    return _timm_backbone(module, job), why


def _timm_arguments(named: _Timm, state: State) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The architecture that weights are for: their classes and channels; and sentences about it."""
    classifiers, stated = _names(named.cfg.get("classifier")), named.cfg.get("num_classes")
    rows = next((count for name in classifiers if (count := _rows(state, name)) is not None), None)
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


def _timm_backbone(module: Any, job: ImportJob) -> Any:
    if job.backbone_only and module.num_classes:
        module.reset_classifier(0)
    return module


def _names(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()


def _timm_data(named: _Timm, module: Any, job: ImportJob) -> dict[str, Any]:
    """Arguments of timm's transform."""
    import timm.data

    cfg = {**module.pretrained_cfg, **{name: value for name, value in named.cfg.items() if value is not None}}
    data: dict[str, Any] = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    first = _names(cfg.get("first_conv"))
    channels = int(module.get_parameter(f"{first[0]}.weight").shape[1]) if first else int(data["input_size"][0])
    stated = named.arguments.get("img_size") or data["input_size"][1:]
    return data | {"input_size": (channels, *_sides(job, stated))}


def _sides(job: ImportJob, stated: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of the input: the flag's, else those that are stated."""
    sides = job.fitting.input_size or ((stated,) if isinstance(stated, int) else tuple(stated))
    return int(sides[0]), int(sides[-1])


def _timm_geometry(data: Mapping[str, Any]) -> dict[str, Any]:
    """The resize rule of timm's `transforms_imagenet_eval`, as facts."""
    height, width = data["input_size"][1:]
    mode, share = data["crop_mode"], data["crop_pct"] or 0.875
    scaled = math.floor(height / share)
    interpolation = data["interpolation"]
    fill = {round(255 * value) for value in data["mean"]}
    if interpolation not in _INTERPOLATIONS:
        raise ConfigError(f"timm's interpolation {interpolation!r} is no fixed filter; choose one with --interpolation")
    found: dict[str, Any] = {"interpolation": interpolation, "resize_px": None}
    if mode == "squash" and share == 1:
        return found | {"resize": "stretch"}
    if mode == "border" and share == 1 and len(fill) == 1:
        return found | {"resize": "longest-edge-pad", "pad_value": fill.pop()}
    if height == width and mode in ("squash", "center"):
        return found | {"resize": "stretch" if mode == "squash" else "shortest-edge", "resize_px": scaled}
    raise ConfigError(
        f"timm's way to fit images has no counterpart in a bundle; export the model as ONNX and import that with "
        f"--resize. Received: crop_mode={mode!r}, crop_pct={share}, {height} x {width} px"
    )


def _timm_labels(named: _Timm, classes: int | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
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


# --- torchvision -----------------------------------------------------------------------------------------------------


def _load_torchvision(job: ImportJob) -> Loaded:
    from torchvision import models

    name, _, tag = job.source.removeprefix(TORCHVISION).partition(".")
    known = models.list_models(module=models)
    if name not in known:
        hint = suggestion(name, known)
        raise ConfigError(f"torchvision has no such classifier{hint}. Received: {job.source!r}")
    weights, why = _torchvision_weights(models.get_model_weights(name), tag, job)
    module = _torchvision_module(name, weights, job)
    transform = weights.transforms()
    names = tuple(weights.meta["categories"])
    classes = None if job.backbone_only else _outputs(module)
    height, width = _sides(job, transform.crop_size)
    return Loaded(
        name=name,
        module=(module if classes else _without_head(module)).eval(),
        transform=transform,
        facts=Facts(
            class_names=names if classes == len(names) else None,
            height_px=height,
            width_px=width,
            is_size_fixed=True,
            channels=3,
            resize="shortest-edge",
            resize_px=transform.resize_size[0],
            resampling="pillow",
            interpolation=transform.interpolation.value,
            antialias=True,
            crop_rounding="even",
            num_outputs=classes,
            why=why,
            **_normalization(transform.mean, transform.std, 3),
        ),
    )


def _torchvision_weights(table: Any, tag: str, job: ImportJob) -> tuple[Any, tuple[str, ...]]:
    """The weights whose transform counts, and why."""
    tags = [weights.name for weights in table]
    if tag and tag != "DEFAULT" and tag not in tags:
        raise ConfigError(f"torchvision has the weights {', '.join(tags)} of it. Received: {job.source!r}")
    file = Path(job.checkpoint or "").name
    same = next((weights for weights in table if file and weights.url.endswith(f"/{file}")), None)
    if tag or same:
        return (table[tag] if tag and tag != "DEFAULT" else same or table.DEFAULT), ()
    if len(tags) == 1 or job.checkpoint is None:
        return table.DEFAULT, ()
    others = ", ".join(name for name in tags if name != table.DEFAULT.name)
    sentence = (
        f"images are prepared as for torchvision's {table.DEFAULT.name}; for another way, name the weights, as in "
        f"{job.source}.{others.split(', ')[0]} (there are {others})"
    )
    return table.DEFAULT, (sentence,)


def _torchvision_module(name: str, weights: Any, job: ImportJob) -> Any:
    from torchvision import models

    if job.checkpoint is None:
        return _downloaded(lambda: models.get_model(name, weights=weights), name)
    state = read_checkpoint(Path(job.checkpoint))
    usual = _torchvision_network(name)
    rows = _rows(state, _head(usual))
    module = usual if rows in (None, _outputs(usual)) else _torchvision_network(name, num_classes=rows)
    _fill(module, state, name=name, path=Path(job.checkpoint))
    return module


def _torchvision_network(name: str, **arguments: Any) -> Any:
    from torchvision import models

    if name in _NORMALIZES_ITSELF:
        arguments |= {"transform_input": True, "init_weights": False}
    return models.get_model(name, weights=None, **arguments)


def _outputs(module: Any) -> int:
    """K of a network."""
    return int(module.get_submodule(_head(module)).weight.shape[0])


def _normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> dict[str, Any]:
    """`(pixels / 255 - mean) / std` as one factor and one offset per channel."""
    if len(mean) not in (1, channels):
        return {}
    return {
        "scale": tuple(1 / 255 / value for value in std),
        "offset": tuple(-m / s for m, s in zip(mean, std, strict=True)),
    }
