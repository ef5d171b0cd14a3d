"""torchvision as a source: a named classifier.

Owns: building the model with its weights, and what `weights.transforms()` says. Does not own: the ONNX file and the
reference (`torch_export`), or reading checkpoints (`checkpoints`).
"""

# K = classes

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, suggestion
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.checkpoints import read_checkpoint
from mnist_dist.importing.foreign import Facts, Foreign
from mnist_dist.importing.torch_export import (
    Loaded,
    check_installed,
    downloaded,
    exported,
    fill_weights,
    head_name,
    input_sides,
    normalization,
    num_rows,
)

if TYPE_CHECKING:
    import torch

TORCHVISION = "torchvision:"
_NORMALIZES_ITSELF = frozenset({"googlenet", "inception_v3"})
"""Models of torchvision that undo the usual normalisation inside, if built for its weights."""


def open_torchvision(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """`torchvision:NAME`, or `torchvision:NAME.WEIGHTS` for the transform of other weights than the default ones.

    See `timm_models.open_timm`.
    """
    return exported("torchvision", load_torchvision, job, scratch)


def load_torchvision(job: ImportJob) -> Loaded:
    """Builds the model of a job; see `open_torchvision`."""
    check_installed("torchvision", job)
    from torchvision import models

    name, _, tag = job.source.removeprefix(TORCHVISION).partition(".")
    known = models.list_models(module=models)
    if name not in known:
        hint = suggestion(name, known)
        raise ConfigError(f"torchvision has no such classifier{hint}. Received: {job.source!r}")
    weights, why = _weights(models.get_model_weights(name), tag, job)
    module = _module(name, weights, job)
    transform = weights.transforms()
    names = tuple(weights.meta["categories"])
    classes = None if job.backbone_only else _outputs(module)
    height, width = input_sides(job, transform.crop_size)
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
            **normalization(transform.mean, transform.std, 3),
        ),
    )


def _weights(table: Any, tag: str, job: ImportJob) -> tuple[Any, tuple[str, ...]]:
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


def _module(name: str, weights: Any, job: ImportJob) -> Any:
    from torchvision import models

    if job.checkpoint is None:
        return downloaded(lambda: models.get_model(name, weights=weights), name)
    state = read_checkpoint(Path(job.checkpoint))
    usual = _network(name)
    rows = num_rows(state, head_name(usual))
    module = usual if rows in (None, _outputs(usual)) else _network(name, num_classes=rows)
    fill_weights(module, state, name=name, path=Path(job.checkpoint))
    return module


def _network(name: str, **arguments: Any) -> Any:
    from torchvision import models

    if name in _NORMALIZES_ITSELF:
        arguments |= {"transform_input": True, "init_weights": False}
    return models.get_model(name, weights=None, **arguments)


def _without_head(module: "torch.nn.Module") -> "torch.nn.Module":
    import torch

    name = head_name(module)
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, torch.nn.Identity())
    return module


def _outputs(module: Any) -> int:
    """K of a network."""
    return int(module.get_submodule(head_name(module)).weight.shape[0])
