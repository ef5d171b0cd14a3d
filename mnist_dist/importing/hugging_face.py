"""Folders of Hugging Face as a source: an ONNX file, and beside it what the classes and the pixels are.

Owns: which files of the folder are read, the facts of `config.json`, which outputs are logits and features, and the
reference. Does not own: the image processor (`hf_processors`), or reading graphs (`onnx_graph`). No code of a folder
is ever executed.
"""

# N = images, H = height px, W = width px, C = channels, K = outputs, D = features, T = tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from mnist_dist import documents
from mnist_dist.config import Activation
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.as_stated import fitted, is_as_stated, opened
from mnist_dist.importing.foreign import Asked, Facts, Foreign, Values
from mnist_dist.importing.hf_processors import PROCESSOR_FILE, Processor, processor
from mnist_dist.importing.onnx_graph import (
    GraphInput,
    check_tensor,
    features_of,
    final_activation,
    graph_input,
    num_outputs,
    read_graph,
    shapes_of,
)
from mnist_dist.importing.onnx_models import run_graph

CONFIG_FILE = "config.json"
NESTED_FILE = "processor_config.json"
"""Holds the image processor of a model that has a tokenizer, too."""
MODEL_FILES = ("model.onnx", "onnx/model.onnx")
_VISION_FILE = "vision_model.onnx"
_FEATURES = ("image_embeds", "pooler_output")
_TOKENS = "last_hidden_state"
_CLASS_TOKEN = frozenset(
    {"vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn", "vit_mae", "clip_vision_model", "clip"}
)
"""Models whose first token stands for the image."""
CLS = "cls_features"
_PROBLEMS: dict[str, tuple[Activation, bool]] = {
    "single_label_classification": ("softmax", False),
    "multi_label_classification": ("sigmoid", True),
}
"""By `problem_type`: the activation, and whether an image has several labels."""

Pixels = npt.NDArray[np.float32]
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """The fields of `config.json` that are read."""

    model_type: str | None = None
    id2label: dict[str, str] | None = None
    problem_type: str | None = None
    image_size: int | list[int] | None = None


def open_hugging_face(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """A folder with `config.json`, `preprocessor_config.json` and an ONNX file, at the local path that the job names.

    Args:
        job: the import.
        scratch: an empty folder, for a graph that has to be completed.
        report: unused; there is nothing that takes long.

    Raises:
        ConfigError: a file is missing or says what no bundle can do, or the model has several inputs or no logits.
        DataError: a file is not what it should be; the message names the field.
    """
    folder = Path(job.source)
    config = _read(folder / CONFIG_FILE, ModelFile)
    steps = _processor(folder, config)
    if not steps.is_fixed and job.fitting.resize is None:
        raise ConfigError(
            f"{PROCESSOR_FILE} gives images no fixed size; choose how they are fitted with --resize. "
            f"Received: {str(folder)!r}"
        )
    chosen, why = _model_file(folder, job)
    graph = _Graph.read(chosen, config, job, scratch)
    facts = _facts(graph, config, steps, job, why=why)
    slow, fast = _of_transformers(folder, is_fast=False), _of_transformers(folder, is_fast=True)
    run = partial(run_folder, folder, graph.file, graph.output or graph.features or "", facts)
    file_name = "the ONNX file as it is in ONNX Runtime"
    return Foreign(
        kind="hugging_face",
        name=folder.resolve().name,
        file=graph.file,
        facts=facts,
        reference=run,
        reference_name=f"{slow[0] if slow and steps.is_fixed else 'Pillow and NumPy'}, and {file_name}",
        whole=partial(run, is_fast=True) if fast and steps.is_fixed else None,
        whole_name=f"{fast[0]}, and {file_name}" if fast and steps.is_fixed else "",
    )


def run_folder(
    folder: Path, file: Path, output: str, facts: Facts, images: Sequence[bytes], asked: Asked, *, is_fast: bool = False
) -> Values:
    """The folder's image processor, then its ONNX file in ONNX Runtime: `float32 [N, K]` after the activation.

    The image processor is that of transformers where that is installed, the slow one unless `is_fast`, else the same
    steps in Pillow and NumPy. Images are fitted and normalised as asked where flags have changed what the folder says,
    or where it gives images no fixed size.
    """
    prepare = _preparation(folder, asked, facts, is_fast=is_fast)
    return run_graph(file, asked.output or output, images, asked, prepare=prepare)


def _preparation(folder: Path, asked: Asked, facts: Facts, *, is_fast: bool) -> Callable[[bytes], Pixels]:
    """What makes the model's input of an encoded image, `float32 [C, H, W]`."""
    steps = _processor(folder, _read(folder / CONFIG_FILE, ModelFile))
    if not (steps.is_fixed and is_as_stated(asked, facts)):
        return partial(fitted, asked=asked)
    channels = asked.spec.channels
    theirs = _of_transformers(folder, is_fast=is_fast) if channels == 3 else None
    prepare = theirs[1] if theirs else steps.prepare
    return lambda data: prepare(opened(data, channels=channels))


def _of_transformers(folder: Path, *, is_fast: bool) -> tuple[str, Callable[[Image.Image], Pixels]] | None:
    """The image processor of transformers, on Pillow or (fast) on torch, and its name; None: there is none."""
    try:
        import transformers
    except ImportError:
        return None
    is_new = int(transformers.__version__.split(".")[0]) >= 5
    options = {"backend": "torchvision" if is_fast else "pil"} if is_new else {"use_fast": is_fast}
    try:
        made = transformers.AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception:  # a class that this version does not have, or a file that it reads otherwise
        return None
    on_torch = getattr(made, "backend", "pil") == "torchvision" or type(made).__name__.endswith("Fast")
    if on_torch != is_fast:
        return None

    def prepare(image: Image.Image) -> Pixels:
        values = made(images=[image], return_tensors="np")["pixel_values"][0]
        return np.asarray(values, np.float32)

    return f"{type(made).__name__} of transformers {transformers.__version__}", prepare


# --- the folder's files ----------------------------------------------------------------------------------------------


def _read(path: Path, kind: type[Kind]) -> Kind:
    """A JSON file of the folder."""
    try:
        return documents.decode(path.read_bytes(), kind, uri=str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"a Hugging Face folder needs {CONFIG_FILE}, {PROCESSOR_FILE} and an ONNX file; an ONNX file alone is "
            f"imported by its own path. Received: no {path.name} in {str(path.parent)!r}"
        ) from None


def _processor(folder: Path, config: ModelFile) -> Processor:
    path = folder / PROCESSOR_FILE
    nested = folder / NESTED_FILE
    if not path.exists() and nested.exists():
        content = _read(nested, dict)
        inner = content.get("image_processor")
        if not isinstance(inner, dict):
            raise DataError(f"{nested} has no image_processor. Received: {', '.join(map(str, content)) or 'no field'}")
        return processor(inner, model_type=config.model_type, path=str(nested))
    return processor(_read(path, dict), model_type=config.model_type, path=str(path))


def _model_file(folder: Path, job: ImportJob) -> tuple[Path, tuple[str, ...]]:
    """The ONNX file to import, and why that one."""
    found = sorted(path for path in (*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in found]
    chosen = next((name for name in MODEL_FILES if name in names), None)
    vision = [name for name in names if name.rpartition("/")[2] == _VISION_FILE]
    if job.backbone_only and vision:
        chosen = vision[0]
    if chosen is None:
        raise ConfigError(
            f"a Hugging Face folder needs model.onnx or onnx/model.onnx; an ONNX file is made with `optimum-cli export "
            f"onnx`. Received: {', '.join(names) or 'no .onnx file'} in {str(folder)!r}"
        )
    others = [name for name in names if name != chosen]
    return folder / chosen, (f"of several ONNX files, {chosen} was taken, not {', '.join(others)}",) if others else ()


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """The ONNX file, and which of its tensors count."""

    file: Path
    output: str | None
    features: str | None
    num_outputs: int | None
    source: GraphInput
    activation: str | None
    """Name of the operator that the output ends with."""
    why: tuple[str, ...]

    @classmethod
    def read(cls, file: Path, config: ModelFile, job: ImportJob, scratch: Path) -> "_Graph":
        model = read_graph(file)
        source = graph_input(model, file=file)
        if source.is_uint8:
            raise ConfigError(
                f"the model takes pixels as they are, against {PROCESSOR_FILE}; import the ONNX file by its own path. "
                f"Received: the input {source.name!r} is uint8 in {str(file)!r}"
            )
        output = None if job.backbone_only else _logits(model, job, file)
        features, why = _features(model, config, job, output, file)
        if features == CLS:
            file = _with_class_token(model, scratch / "model.onnx")
        if job.backbone_only and features is None:
            raise ConfigError(
                f"the model has no output that is known to hold features; choose one with --features-node. "
                f"Received: {', '.join(_outputs(model))} in {str(file)!r}"
            )
        return cls(
            file=file,
            output=output,
            features=features,
            num_outputs=num_outputs(model, output) if output else None,
            source=source,
            activation=final_activation(model, output) if output else None,
            why=why,
        )


def _logits(model: Any, job: ImportJob, file: Path) -> str:
    if job.output_node is not None:
        check_tensor(model, job.output_node, flag="--output-node")
        return job.output_node
    names = _outputs(model)
    if "logits" in names:
        return "logits"
    others = [name for name in names if name not in (*_FEATURES, _TOKENS)]
    if len(others) == 1:
        return others[0]
    raise ConfigError(
        f"the model has no output logits; choose one with --output-node, or import it with --backbone-only if it gives "
        f"features. Received: {', '.join(names)} in {str(file)!r}"
    )


def _features(
    model: Any, config: ModelFile, job: ImportJob, output: str | None, file: Path
) -> tuple[str | None, tuple[str, ...]]:
    """The tensor that holds the features, and why that one."""
    if job.features_node is not None:
        check_tensor(model, job.features_node, flag="--features-node")
        return job.features_node, ()
    shapes = shapes_of(model)
    names = [name for name in _outputs(model) if name != output]
    for name in _FEATURES:
        if name in names and len(shapes.get(name, ())) in (2, 4):
            return name, (f"features are the output {name}",)
    if output is not None:
        return features_of(model, output), ()
    if _TOKENS in names and len(shapes.get(_TOKENS, ())) == 3 and config.model_type in _CLASS_TOKEN:
        return CLS, (f"features are the first token of {_TOKENS}, as is usual with {config.model_type}",)
    return None, ()


def _facts(graph: _Graph, config: ModelFile, steps: Processor, job: ImportJob, *, why: tuple[str, ...]) -> Facts:
    names, sentences = _class_names(config, Path(job.source)) if graph.output else (None, ())
    activation, multi_label = _activation(graph, config) if graph.output else (None, None)
    facts = _sized(steps.facts(), graph, config)
    return replace(
        facts,
        class_names=names,
        channels=graph.source.channels,
        activation=activation,
        multi_label=multi_label,
        num_outputs=graph.num_outputs,
        output=graph.output,
        features=graph.features,
        why=(*why, *graph.why, *facts.why, *sentences),
    )


def _activation(graph: _Graph, config: ModelFile) -> tuple[Activation | None, bool | None]:
    """What has to follow the output, and whether an image has several labels; None: the files do not say."""
    stated = _PROBLEMS.get(config.problem_type or "")
    if graph.activation is not None:
        ends = graph.activation == "Sigmoid" and graph.num_outputs != 1
        return "none", ends if stated is None else stated[1]
    return (None, None) if stated is None else stated


def _sized(facts: Facts, graph: _Graph, config: ModelFile) -> Facts:
    """With the input size, on which the processor and the graph must agree."""
    stated, fixed = (facts.height_px, facts.width_px), (graph.source.height_px, graph.source.width_px)
    if None not in stated and any(one not in (None, other) for one, other in zip(fixed, stated, strict=True)):
        raise ConfigError(
            f"{PROCESSOR_FILE} makes images of {stated[0]} x {stated[1]} px, the model takes {fixed[0]} x {fixed[1]}. "
            f"Received: {str(graph.file)!r}"
        )
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    known = next((pair for pair in (stated, fixed, sides) if len(pair) == 2 and None not in pair), (None, None))
    return replace(facts, height_px=known[0], width_px=known[1], is_size_fixed=None not in fixed)


def _class_names(config: ModelFile, folder: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """`id2label` in the order of its numbers."""
    labels = config.id2label
    if not labels:
        return None, ()
    numbers = sorted(int(key) for key in labels if key.isascii() and key.isdigit())
    if numbers != list(range(len(labels))):
        raise DataError(
            f"{folder / CONFIG_FILE}: the keys of id2label must be 0 to {len(labels) - 1}. "
            f"Received: {', '.join(list(labels)[:10])}"
        )
    names = tuple(labels[str(number)] for number in numbers)
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        return names, (f"{CONFIG_FILE} has no class names but LABEL_0 and so on; --classes gives others",)
    return names, ()


def _outputs(model: Any) -> list[str]:
    return [value.name for value in model.graph.output]


def _with_class_token(model: Any, target: Path) -> Path:
    """The graph with one more output, the first token `[N, D]` of the tokens `[N, T, D]`."""
    import onnx
    from onnx import TensorProto, helper

    size = shapes_of(model)[_TOKENS]
    model.graph.initializer.append(helper.make_tensor(f"{CLS}/first", TensorProto.INT64, [], [0]))
    model.graph.node.append(helper.make_node("Gather", [_TOKENS, f"{CLS}/first"], [CLS], axis=1))
    elem_type = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == _TOKENS)
    model.graph.output.append(helper.make_tensor_value_info(CLS, elem_type, [size[0] or "batch", size[2]]))
    onnx.save(model, str(target))
    return target
