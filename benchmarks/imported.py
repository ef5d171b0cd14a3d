"""Imported models beside timm's and torchvision's own pipelines: twelve architectures on real photographs.

Owns: the models, their weights, the photographs, the comparison and its controls. Does not own: the import.

Contract: no network is needed. Weights are random, with a fixed seed: BatchNorm gets its statistics from photographs,
and the last layer is scaled until the median top probability exceeds 0.5, so that a pixel which is wrong shows in the
probabilities. Each model is opened, read and built as by `import`, and compared with torch behind the library's own
transform on Pillow's image. What torch's float32 differs from its float64 is shown beside it: closer agreement cannot
be expected. The controls are the original with wrong pixels: they must disagree.
"""

# N = images, C = channels, H = height px, W = width px, K = classes, D = features

import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mnist_dist import processor
from mnist_dist.config import DecodeQuality, require
from mnist_dist.console import Console
from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.comparison import BundleModel, Compared, compare
from mnist_dist.importing.onnx_graph import build_onnx
from mnist_dist.importing.recipe import Recipe, recipe_of
from mnist_dist.importing.sources import find_source
from mnist_dist.models.bundle import ONNX_FILE

if TYPE_CHECKING:
    import torch

MODELS: Mapping[str, str] = {
    "ResNet18": "torchvision:resnet18",
    "ResNet50": "timm:resnet50",
    "VGG16-BN": "torchvision:vgg16_bn",
    "MobileNetV2": "torchvision:mobilenet_v2",
    "MobileNetV3-L": "timm:mobilenetv3_large_100",
    "EfficientNet-B0": "timm:efficientnet_b0",
    "ConvNeXt-T": "timm:convnext_tiny",
    "ViT-S/16": "timm:vit_small_patch16_224",
    "DeiT-S/16": "timm:deit_small_patch16_224",
    "Swin-T": "timm:swin_tiny_patch4_window7_224",
    "DINOv2-S/14": "timm:vit_small_patch14_dinov2",
    "CLIP ViT-B/32": "timm:vit_base_patch32_clip_224",
}
SMALLER_PX = {"timm:vit_small_patch14_dinov2": 224}
"""Models measured at another size than the published weights'; they are imported as the folders that timm saves."""
CLASSES = 1000
CONTROLS = ("BGR", "other filter", "no mean and std")
COLUMNS = (
    "model",
    "source",
    "input, px",
    "median top probability, classes",
    "largest difference of a probability",
    "torch's float32 to its float64",
    "logits, norm-relative",
    "same top class: exact",
    "fast",
    *CONTROLS,
)
MIN_SIDE_PX, MAX_SIDE_PX = 100, 5000
_FITTED = 64
"""Photographs that BatchNorm and the last layer are fitted to."""
_BATCH = 8
_OTHER_FILTER = {"bicubic": "bilinear", "bilinear": "bicubic"}

Values = Any  # float32 arrays; NumPy's types of them say no more here
Transform = Callable[[Image.Image], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class ImportedBenchmark:
    """Compares imported models with timm's and torchvision's own pipelines; needs the extra [torch]."""

    images: str | None = None
    """Folder of photographs; those with an EXIF rotation or transparency are left out, which the libraries ignore and
    the project obeys. None: crops of scikit-learn's and scikit-image's photographs, of many sizes."""
    count: int = 200
    """Number of photographs."""
    controls: int = 40
    """Number of photographs for the controls."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which models."""
    trained: tuple[str, ...] = ()
    """Further models, with trained weights, each as `timm:NAME=CHECKPOINT`: random networks change their mind at far
    smaller differences than trained ones, so these judge fast decoding."""
    seed: int = 0
    """Seed of the weights and of the crops."""
    verbose: bool = False
    """Show what the libraries print."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.models) - set(MODELS))
        require(not unknown, f"models are {', '.join(MODELS)}", models=unknown)
        wrong = [entry for entry in self.trained if not (entry.startswith("timm:") and "=" in entry)]
        require(not wrong, "trained models are timm:NAME=CHECKPOINT", trained=wrong)
        require(self.count >= 1, "count must be at least 1", count=self.count)
        require(self.controls >= 1, "controls must be at least 1", controls=self.controls)


@dataclass(frozen=True, kw_only=True)
class Original:
    """A model in torch, and its library's own transforms."""

    source: str
    module: "torch.nn.Module"
    transform: Transform
    other_filter: Transform
    """With another interpolation."""
    mean: "torch.Tensor"
    std: "torch.Tensor"


def measure(benchmark: ImportedBenchmark, *, console: Console) -> dict[str, Any]:
    """Imports and compares.

    Returns:
        `models`: name -> figures (see `_compared`); `images`, `sizes` (distinct ones), `versions`, `machine`, `date`.
    """
    import timm
    import torch
    import torchvision

    with tempfile.TemporaryDirectory() as folder:
        photographs = _photographs(benchmark)
        sizes = {Image.open(io.BytesIO(data)).size for data in photographs}
        console.line(f"{len(photographs)} photographs of {len(sizes)} sizes")
        results = {}
        for name in benchmark.models:
            original = _original(MODELS[name], photographs, benchmark.seed)
            results[name] = _measured(original, photographs, benchmark, Path(folder))
            console.line(_row(name, results[name]))
        for entry in benchmark.trained:
            source, _, checkpoint = entry.partition("=")
            name = f"{source.partition(':')[2]}, trained"
            results[name] = _measured(_trained(source, checkpoint), photographs, benchmark, Path(folder))
            console.line(_row(name, results[name]))
    return {
        "models": results,
        "images": len(photographs),
        "sizes": len(sizes),
        "versions": {"timm": timm.__version__, "torchvision": torchvision.__version__, "torch": torch.__version__},
        "machine": processor.described(),
        "date": date.today().isoformat(),
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [_row(name, figures) for name, figures in result["models"].items()]
    return "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *rows])


def _row(name: str, figures: Mapping[str, Any]) -> str:
    differences = [figures[key] for key in ("max_abs_difference", "float32_difference", "relative_difference")]
    agreements = [figures["agreement"], figures["fast_agreement"], *(figures["controls"][name] for name in CONTROLS)]
    return _line(
        [
            name,
            f"`{figures['source']}`",
            figures["fitting"],
            f"{figures['median_top']:.2f}, {figures['classes']}",
            *(f"{value:.1e}" for value in differences),
            *(f"{value:.1%}" for value in agreements),
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- photographs -----------------------------------------------------------------------------------------------------


def _photographs(benchmark: ImportedBenchmark) -> list[bytes]:
    """Encoded photographs of many sizes."""
    if benchmark.images is None:
        return list(_crops(benchmark.count, benchmark.seed))
    paths = sorted(path for path in Path(benchmark.images).rglob("*") if path.is_file())
    usable = [path for path in paths if _is_usable(path)]
    require(len(usable) >= benchmark.count, f"images has {benchmark.count} photographs", images=len(usable))
    chosen = np.linspace(0, len(usable) - 1, benchmark.count).astype(int)
    return [usable[number].read_bytes() for number in chosen]


def _is_usable(path: Path) -> bool:
    """Whether it is whole, and the libraries, which know neither rotation nor transparency, open it as it is meant."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            is_plain = image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1
            is_sized = min(image.size) >= MIN_SIDE_PX and max(image.size) <= MAX_SIDE_PX
        if is_plain and is_sized:
            decode_image(path.read_bytes(), ImageSpec(height_px=8, width_px=8, channels=3))
        return is_plain and is_sized
    except (OSError, SyntaxError, ValueError, ImageError):  # no image, or a damaged one
        return False


def _crops(count: int, seed: int) -> Iterable[bytes]:
    from benchmarks.photos import photographs

    sources = photographs()
    for number in range(count):
        random = np.random.default_rng([seed, number])
        source = sources[int(random.integers(len(sources)))]
        width, height = (int(random.integers(int(side * 0.4), side + 1)) for side in source.size)
        left, top = int(random.integers(source.width - width + 1)), int(random.integers(source.height - height + 1))
        scale = float(random.uniform(0.5, 2.5))
        size = (max(MIN_SIDE_PX, round(width * scale)), max(MIN_SIDE_PX, round(height * scale)))
        image = source.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(random.integers(75, 96)))
        yield stream.getvalue()


# --- models ----------------------------------------------------------------------------------------------------------


def _original(source: str, photographs: Sequence[bytes], seed: int) -> Original:
    """A model whose random weights are fitted to photographs."""
    import torch

    torch.manual_seed(seed)
    library, _, name = source.partition(":")
    original = _of_timm(source, name) if library == "timm" else _of_torchvision(source, name)
    batch = torch.stack([original.transform(_opened(data)) for data in photographs[:_FITTED]])
    with torch.inference_mode():
        _open_branches(original.module)
        _calibrate(original.module, batch)
        _sharpen(original.module, _logits(original.module, batch))
    return original


def _trained(source: str, checkpoint: str) -> Original:
    import timm.models

    original = _of_timm(source, source.partition(":")[2])
    timm.models.load_checkpoint(original.module, checkpoint)
    return original


def _of_timm(source: str, name: str) -> Original:
    import timm
    import timm.data
    import torch

    side = SMALLER_PX.get(source)
    sized = {} if side is None else {"img_size": side}
    module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **sized)
    data = timm.data.resolve_data_config({} if side is None else {"input_size": (3, side, side)}, model=module)
    other = data | {"interpolation": _OTHER_FILTER[data["interpolation"]]}
    return Original(
        source=source,
        module=module.eval(),
        transform=timm.data.create_transform(**data, is_training=False),
        other_filter=timm.data.create_transform(**other, is_training=False),
        mean=torch.tensor(data["mean"])[:, None, None],
        std=torch.tensor(data["std"])[:, None, None],
    )


def _of_torchvision(source: str, name: str) -> Original:
    import torch
    from torchvision import models
    from torchvision.transforms import InterpolationMode

    transform = models.get_model_weights(name).DEFAULT.transforms()
    other = models.get_model_weights(name).DEFAULT.transforms(interpolation=InterpolationMode.BICUBIC)
    return Original(
        source=source,
        module=models.get_model(name, weights=None, num_classes=CLASSES).eval(),
        transform=transform,
        other_filter=other,
        mean=torch.tensor(transform.mean)[:, None, None],
        std=torch.tensor(transform.std)[:, None, None],
    )


def _open_branches(module: "torch.nn.Module") -> None:
    """Sets the scales of residual branches, which start near 0, to 1: else the image hardly counts."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)


def _calibrate(module: "torch.nn.Module", batch: "torch.Tensor") -> None:
    """Gives BatchNorm the statistics of photographs."""
    import torch

    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.train()
        layer.momentum = None  # the mean over all batches
        layer.reset_running_stats()
    for part in batch.split(16) if layers else ():
        module(part)
    for layer in layers:
        layer.eval()
        layer.momentum = 0.1


def _sharpen(module: "torch.nn.Module", logits: "torch.Tensor") -> None:
    """Centres the last layer on photographs, and scales it until the median top probability exceeds 0.5."""
    import torch

    head = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1]
    centred = logits - logits.mean(dim=0)
    scale = 1.0
    while (centred * scale).softmax(dim=1).amax(dim=1).median() <= 0.55:  # a margin, for other photographs
        scale *= 1.05
    head.weight.mul_(scale)
    head.bias.sub_(logits.mean(dim=0)).mul_(scale)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _logits(module: "torch.nn.Module", batch: "torch.Tensor") -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        return torch.cat([module(part) for part in batch.split(_BATCH)])


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import has built."""

    recipe: Recipe
    model: BundleModel


def _measured(
    original: Original, photographs: Sequence[bytes], benchmark: ImportedBenchmark, folder: Path
) -> dict[str, Any]:
    """The figures of one model; what it wrote is deleted."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        imported = _imported(_saved(original, Path(scratch)), Path(scratch))
        return _compared(imported, original, photographs, benchmark)


def _imported(job: ImportJob, scratch: Path) -> Imported:
    foreign = find_source(job.source).open(job, scratch, lambda done, total: None)
    recipe = recipe_of(job, foreign, classes=None)
    build_onnx(foreign.file, recipe, scratch / ONNX_FILE)
    return Imported(recipe=recipe, model=BundleModel(scratch / ONNX_FILE, has_classes=True))


def _saved(original: Original, scratch: Path) -> ImportJob:
    """The import of a model: by its name with a checkpoint, or as a folder."""
    import torch

    output = str(scratch / "bundle")  # never written
    if original.source in SMALLER_PX:
        from timm.models import save_for_hf

        arguments = {"img_size": SMALLER_PX[original.source]}
        save_for_hf(original.module, str(scratch / "model"), model_args=arguments, safe_serialization=True)
        return ImportJob(source=str(scratch / "model"), output=output)
    checkpoint = str(scratch / "checkpoint.pth")
    torch.save({"state_dict": original.module.state_dict()}, checkpoint)
    return ImportJob(source=original.source, output=output, checkpoint=checkpoint)


def _compared(
    imported: Imported, original: Original, photographs: Sequence[bytes], benchmark: ImportedBenchmark
) -> dict[str, Any]:
    """Differences and agreements of an import with the original, and of the controls."""
    recipe, few = imported.recipe, photographs[: benchmark.controls]
    truth = _probabilities(original, photographs, original.transform)
    exact, fast = (_imported_probabilities(imported, photographs, quality=quality) for quality in ("exact", "fast"))
    found = _differences(exact, truth, recipe)
    controls = {
        control: _differences(exact[: len(few)], _probabilities(original, few, transform), recipe)
        for control, transform in zip(CONTROLS, _controls(original), strict=True)
    }
    noise = _differences(truth[: len(few)], _probabilities(original, few, original.transform, is_double=True), recipe)
    return {
        "source": original.source,
        "fitting": _fitting(recipe),
        "median_top": float(np.median(truth.max(axis=1))),
        "classes": len(set(truth.argmax(axis=1).tolist())),
        "max_abs_difference": found.max_abs_difference,
        "relative_difference": found.relative_difference,
        "float32_difference": noise.max_abs_difference,
        "agreement": found.agreement,
        "fast_agreement": _differences(fast, truth, recipe).agreement,
        "controls": {control: value.agreement for control, value in controls.items()},
        "control_differences": {control: value.max_abs_difference for control, value in controls.items()},
        "controls_fail": all(not value.is_same for value in controls.values()),
    }


def _fitting(recipe: Recipe) -> str:
    spec = recipe.spec
    resized = f"{spec.resize}{'' if spec.resize_px is None else f' {spec.resize_px}'}"
    return f"{spec.height_px}, {resized}, {spec.interpolation}"


def _controls(original: Original) -> tuple[Transform, ...]:
    """The original's transform with channels swapped, another filter, and pixels in 0-1, in the order of `CONTROLS`."""

    def swapped(image: Image.Image) -> "torch.Tensor":
        return original.transform(Image.merge("RGB", image.split()[::-1]))

    def bare(image: Image.Image) -> "torch.Tensor":
        return original.transform(image) * original.std + original.mean

    return swapped, original.other_filter, bare


def _probabilities(
    original: Original, photographs: Sequence[bytes], transform: Transform, *, is_double: bool = False
) -> Values:
    """`float32 [N, K]` of torch, which may calculate in float64."""
    import torch

    dtype = torch.float64 if is_double else torch.float32
    module, parts = original.module.to(dtype), []
    for start in range(0, len(photographs), _BATCH):
        batch = torch.stack([transform(_opened(data)) for data in photographs[start : start + _BATCH]])
        parts.append(_logits(module, batch.to(dtype)).double().softmax(dim=1).float().numpy())
    original.module.to(torch.float32)  # loses nothing: the weights were float32
    return np.concatenate(parts)


def _imported_probabilities(imported: Imported, photographs: Sequence[bytes], *, quality: DecodeQuality) -> Values:
    """`float32 [N, K]` of the bundle's model, in ONNX Runtime."""
    spec, parts = replace(imported.recipe.spec, quality=quality), []
    for start in range(0, len(photographs), _BATCH):
        pixels = [decode_image(data, spec).pixels for data in photographs[start : start + _BATCH]]
        parts.append(imported.model.outputs(np.stack(pixels)))
    return np.concatenate(parts)


def _differences(values: Values, truth: Values, recipe: Recipe) -> Compared:
    return compare(values, truth, [str(number) for number in range(len(truth))], reference="torch", recipe=recipe)
