"""Models of torch as sources: what timm and torchvision share.

Owns: the ONNX file that torch writes, weights that are filled in, and the reference: the same model behind its
library's own transform. Does not own: building a model and its facts (`timm_models`, `torchvision_models`), reading
checkpoints (`checkpoints`), or the bundle's graph (`onnx_graph`).

A model with random weights is never given: without `--checkpoint`, the library downloads its own.
"""

# N = images, H = height px, W = width px, C = channels, K = classes, D = features

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnist_dist.errors import ConfigError, MnistDistError, WeightsError, first_line
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.as_stated import fitted, is_as_stated, opened
from mnist_dist.importing.checkpoints import State
from mnist_dist.importing.foreign import Asked, Facts, Foreign, Values
from mnist_dist.importing.onnx_graph import features_of, num_outputs, read_graph

if TYPE_CHECKING:
    import torch
    from PIL import Image

OPSET = 18  # the oldest that torch's exporter writes without converting
LOGITS, FEATURES = "logits", "features"
_BATCH = 8

Library = Literal["timm", "torchvision"]
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


Load = Callable[[ImportJob], Loaded]
"""Builds the model that a job names, and its weights; a module-level function."""


def exported(kind: Library, load: Load, job: ImportJob, scratch: Path) -> Foreign:
    """A model as an ONNX file, with its facts and its reference.

    Args:
        kind: the library.
        load: builds the model, here and for the reference.
        job: the import.
        scratch: a folder, for the ONNX file.

    Raises:
        ConfigError: a node is named, which an exported graph does not have.
        MnistDistError: torch cannot write the model as ONNX.
    """
    _check_nodes(kind, job)
    loaded = load(job)
    file = scratch / "exported.onnx"
    _export(loaded, file, output=FEATURES if job.backbone_only else LOGITS)
    torch, library = (importlib.import_module(name) for name in ("torch", kind))
    return Foreign(
        kind=kind,
        name=loaded.name,
        file=file,
        facts=_with_outputs(loaded.facts, file, job),
        reference=partial(run_torch, load, job),
        reference_name=f"{kind} {library.__version__} with torch {torch.__version__}",
    )


def run_torch(load: Load, job: ImportJob, images: Sequence[bytes], asked: Asked) -> Values:
    """The original model in torch: `float32 [N, K]` after the activation, or `[N, D]` features.

    Images are prepared by the library's own transform, from a Pillow image. Where flags have changed how images are
    fitted or normalised, they are prepared as asked.
    """
    import torch

    loaded = load(job)
    prepare = _own_way(loaded) if is_as_stated(asked, loaded.facts) else partial(_as_asked, asked=asked)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            batch = torch.stack([prepare(data) for data in images[start : start + _BATCH]])
            rows.append(loaded.module(batch).double().numpy())
    return asked.activated(np.concatenate(rows))


def check_installed(kind: Library, job: ImportJob) -> None:
    """Imports torch and the library.

    Raises:
        ConfigError: one is missing.
    """
    for name in ("torch", kind):
        try:
            importlib.import_module(name)
        except ImportError as err:
            raise ConfigError(
                f"{kind} models need torch and {kind}: `pip install torch {kind} onnxscript`, or the extra [torch]. "
                f"Received: {job.source!r} ({first_line(err)})"
            ) from None


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


def fill_weights(module: "torch.nn.Module", state: State, *, name: str, path: Path) -> None:
    """Loads weights, all of them.

    Args:
        module: gets the weights.
        state: the weights, by name.
        name: of the model, for messages.
        path: of the checkpoint, for messages.

    Raises:
        WeightsError: they are another model's.
    """
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


def downloaded(make: Callable[[], "torch.nn.Module"], name: str) -> "torch.nn.Module":
    """What `make` gives, which may download weights.

    Raises:
        WeightsError: that fails, in whatever way.
    """
    try:
        return make()
    except Exception as err:  # of the hub's client, urllib or the library
        raise WeightsError(
            f"the weights of {name} cannot be downloaded ({first_line(err)}); give yours with --checkpoint FILE. "
            f"Received: no checkpoint"
        ) from err


def head_name(module: "torch.nn.Module") -> str:
    """Name of the last dense layer, or the last convolution of a network without one."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, layer in module.named_modules() if isinstance(layer, kinds)]
    dense = [name for name in names if isinstance(module.get_submodule(name), torch.nn.Linear)]
    return str((dense or names)[-1])


def num_rows(state: State, layer: str) -> int | None:
    """Number of outputs of a layer in a checkpoint."""
    weight = state.get(f"{layer}.weight")
    return None if weight is None else int(weight.shape[0])


# --- facts -----------------------------------------------------------------------------------------------------------


def input_sides(job: ImportJob, stated: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of the input: the flag's, else those that are stated."""
    sides = job.fitting.input_size or ((stated,) if isinstance(stated, int) else tuple(stated))
    return int(sides[0]), int(sides[-1])


def normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> dict[str, Any]:
    """`(pixels / 255 - mean) / std` as one factor and one offset per channel."""
    if len(mean) not in (1, channels):
        return {}
    return {
        "scale": tuple(1 / 255 / value for value in std),
        "offset": tuple(-m / s for m, s in zip(mean, std, strict=True)),
    }
