"""timm and torchvision: facts, weights, the ONNX file and the reference; and that no file executes anything.

What needs torch is skipped where it is missing, as in CI, and runs in an environment with the extra [torch].
"""

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from corpus import encoded
from PIL import Image

from mnist_dist.errors import ConfigError, WeightsError
from mnist_dist.images.decoder import decode_image
from mnist_dist.import_config import FittingConfig, ImportJob, NormalizationConfig
from mnist_dist.importing import timm_models, torch_export, torchvision_models
from mnist_dist.importing.foreign import Facts, Foreign
from mnist_dist.importing.onnx_graph import build_onnx
from mnist_dist.importing.recipe import Recipe, recipe_of

WHY = "needs torch, torchvision and timm; run in an environment of the extra [torch]"
TINY, TINY_PX = "test_resnet", 160


def report(done: int, total: int) -> None:
    pass


def photographs(count: int = 4) -> list[bytes]:
    random = np.random.default_rng(2)
    small = [random.integers(0, 256, (7, 9, 3)).astype(np.uint8) for _ in range(count)]
    sizes = [(211, 170 + 30 * number) for number in range(count)]
    images = [
        Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one, size in zip(small, sizes, strict=True)
    ]
    return [encoded(image, "PNG") for image in images]


def opened(source: str, folder: Path, **flags: Any) -> Foreign:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    job = ImportJob(source=source, output="bundle", **flags)
    open_it = torchvision_models.open_torchvision if source.startswith("torchvision:") else timm_models.open_timm
    return open_it(job, scratch, report)


def tiny(classes: int = 7, name: str = TINY, **arguments: Any) -> Any:
    timm = pytest.importorskip("timm", reason=WHY)
    import torch

    torch.manual_seed(1)
    module = timm.create_model(name, pretrained=False, num_classes=classes, **arguments)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return module.eval()


def saved(module: Any, path: Path, **wrapping: Any) -> str:
    import torch

    torch.save(wrapping or module.state_dict(), path)
    return str(path)


def bundle_outputs(found: Foreign, folder: Path, **flags: Any) -> tuple[Recipe, list[Any]]:
    """What the bundle's model gives for the photographs."""
    recipe = recipe_of(ImportJob(source="timm:x", output="b", **flags), found, classes=None)
    build_onnx(found.file, recipe, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    pixels = np.stack([decode_image(data, recipe.spec).pixels for data in photographs()])
    return recipe, list(session.run(None, {"image": pixels}))


# --- without torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "library"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_without_torch_the_message_says_what_to_install(
    source: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(ConfigError, match=rf"`pip install torch {library} onnxscript`, or the extra \[torch\]"):
        opened(source, tmp_path)


def test_a_folder_of_transformers_is_told_to_become_onnx(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')

    with pytest.raises(
        ConfigError, match=r"names no architecture of timm\. A model of transformers is imported as ONNX"
    ):
        opened(str(tmp_path), tmp_path)


def test_outputs_cannot_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model of timm has one output"):
        opened("timm:resnet18", tmp_path, output_node="fc")


@pytest.mark.parametrize("source", ["timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize(("only", "there"), [(False, "'logits', and what"), (True, "'features' with --backbone-only")])
def test_features_cannot_be_chosen(source: str, only: bool, there: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"gives {there}.*: leave out --features-node.* --features-node 'pool'"):
        opened(source, tmp_path, features_node="pool", backbone_only=only)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"crop_mode": "center", "crop_pct": 0.95}, {"resize": "shortest-edge", "resize_px": 235}),
        ({"crop_mode": "center", "crop_pct": 1.0}, {"resize": "shortest-edge", "resize_px": 224}),
        ({"crop_mode": "squash", "crop_pct": 1.0}, {"resize": "stretch", "resize_px": None}),
        ({"crop_mode": "squash", "crop_pct": 0.9}, {"resize": "stretch", "resize_px": 248}),
        ({"crop_mode": "border", "crop_pct": 1.0}, {"resize": "longest-edge-pad", "resize_px": None, "pad_value": 128}),
    ],
)
def test_timm_s_ways_to_crop_are_facts(data: dict[str, Any], expected: dict[str, Any]) -> None:
    common = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5)}

    assert timm_models._geometry({**common, **data}) == {"interpolation": "bicubic", **expected}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"interpolation": "random"}, "'random' is no fixed filter"),
        ({"crop_mode": "border", "crop_pct": 0.9}, "no counterpart in a bundle"),
        ({"crop_mode": "border", "crop_pct": 1.0, "mean": (0.485, 0.456, 0.406)}, "no counterpart in a bundle"),
        ({"input_size": (3, 64, 48)}, "no counterpart in a bundle.* 64 x 48 px"),
    ],
)
def test_what_no_bundle_does_is_refused(data: dict[str, Any], message: str) -> None:
    common = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5)}

    with pytest.raises(ConfigError, match=message):
        timm_models._geometry({**common, "crop_mode": "center", "crop_pct": 0.9, **data})


def test_failed_downloads_ask_for_a_checkpoint() -> None:
    def fails() -> Any:
        raise OSError("no route to the hub\nand more")

    with pytest.raises(WeightsError, match=r"of resnet18 cannot be downloaded \(no route to the hub\); .*--checkpoint"):
        torch_export.downloaded(fails, "resnet18")


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "state_dict", "model_ema"])
def test_a_checkpoint_of_timm_becomes_a_bundle_s_model(key: str, tmp_path: Path) -> None:
    module = tiny()
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    wrapping = {key: state, "model": {}, "epoch": 3} if key else state
    checkpoint = saved(module, tmp_path / "w.pth", **wrapping)

    found = opened(f"timm:{TINY}", tmp_path, checkpoint=checkpoint)

    facts = found.facts
    assert (found.kind, found.name) == ("timm", TINY)
    assert (facts.num_outputs, facts.class_names) == (7, None)
    assert (facts.activation, facts.multi_label) == (None, None)
    assert (facts.height_px, facts.width_px, facts.channels, facts.is_size_fixed) == (TINY_PX, TINY_PX, 3, True)
    assert (facts.resampling, facts.crop_rounding) == ("pillow", "even")
    assert any("the checkpoint has 7 classes" in sentence for sentence in facts.why)
    recipe, (probabilities, features) = bundle_outputs(found, tmp_path)
    assert found.reference is not None
    original = found.reference(photographs(), recipe.asked)
    assert np.abs(probabilities - original).max() < 1e-4
    assert np.ptp(original, axis=0).max() > 0.01
    assert features.shape == (4, module.num_features)


def test_the_reference_is_timm_s_own_pipeline(tmp_path: Path) -> None:
    module = tiny()
    import timm.data
    import torch

    found = opened(f"timm:{TINY}", tmp_path, checkpoint=saved(module, tmp_path / "w.pth"))
    recipe, (_, features) = bundle_outputs(found, tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=module), is_training=False)
    images = [Image.open(path).convert("RGB") for path in _files(tmp_path)]
    with torch.inference_mode():
        batch = torch.stack([transform(image) for image in images])
        expected = module(batch).softmax(1).numpy()
        pooled = module.forward_head(module.forward_features(batch), pre_logits=True).numpy()

    assert found.reference is not None
    assert np.abs(found.reference(photographs(), recipe.asked) - expected).max() < 1e-6
    assert np.linalg.norm(features - pooled) / np.linalg.norm(pooled) < 1e-4


def _files(folder: Path) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(4)]
    for path, data in zip(paths, photographs(), strict=True):
        path.write_bytes(data)
    return paths


def test_flags_change_the_reference_with_the_bundle(tmp_path: Path) -> None:
    module = tiny()
    checkpoint = saved(module, tmp_path / "w.pth")
    flags: dict[str, Any] = {
        "fitting": FittingConfig(resize="stretch", interpolation="bilinear"),
        "normalization": NormalizationConfig(preset="0-1"),
    }

    found = opened(f"timm:{TINY}", tmp_path, checkpoint=checkpoint, **flags)

    recipe, (probabilities, _) = bundle_outputs(found, tmp_path, **flags)
    assert recipe.scale == (1 / 255,)
    assert found.reference is not None
    assert np.abs(probabilities - found.reference(photographs(), recipe.asked)).max() < 1e-4


def test_a_model_may_be_a_backbone_only(tmp_path: Path) -> None:
    module = tiny()

    found = opened(f"timm:{TINY}", tmp_path, checkpoint=saved(module, tmp_path / "w.pth"), backbone_only=True)

    assert (found.facts.features, found.facts.output, found.facts.num_outputs) == (
        "features",
        None,
        module.num_features,
    )
    recipe, (features,) = bundle_outputs(found, tmp_path, backbone_only=True)
    assert found.reference is not None
    original = found.reference(photographs(), recipe.asked)
    assert np.linalg.norm(features - original) / np.linalg.norm(original) < 1e-4


def test_a_model_without_classes_says_so(tmp_path: Path) -> None:
    checkpoint = saved(tiny(classes=0), tmp_path / "w.pth")

    with pytest.raises(ConfigError, match="has no classes: import it with --backbone-only"):
        opened(f"timm:{TINY}", tmp_path, checkpoint=checkpoint)


def test_folders_as_timm_saves_them_are_read(tmp_path: Path) -> None:
    module = tiny(in_chans=1)
    from timm.models import save_for_hf

    folder = tmp_path / "model"
    names = [f"name {number}" for number in range(7)]
    save_for_hf(module, str(folder), model_config={"label_names": names}, safe_serialization=True)

    found = opened(str(folder), tmp_path, normalization=NormalizationConfig(mean=(0.5,), std=(0.5,)))

    assert found.facts.class_names == tuple(names)
    assert found.facts.channels == 1
    text = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_args": {"checkpoint_path": "/x"}}, r"may describe the architecture only\. Received: checkpoint_path"),
        ({"architecture": "resnet_19"}, r"timm has no such model \(did you mean resnet1"),
        ({"architecture": None}, "at `.*architecture`"),
    ):
        (folder / "config.json").write_text(json.dumps(text | change))
        with pytest.raises(ConfigError, match=message):
            opened(str(folder), tmp_path)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        ConfigError, match=r"names no architecture of timm\. A model of transformers is imported as ONNX"
    ):
        opened(str(folder), tmp_path)


def test_imagenet_s_classes_have_names(tmp_path: Path) -> None:
    found = opened(f"timm:{TINY}", tmp_path, checkpoint=saved(tiny(classes=1000), tmp_path / "w.pth"))

    assert found.facts.class_names is not None
    assert found.facts.class_names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert "named as those of imagenet-1k" in found.facts.why[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet_19", r"timm has no such model \(did you mean resnet1.*\)"),
        ("torchvision:resnet19", r"torchvision has no such classifier \(did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no such classifier"),
        (
            "torchvision:resnet50.V9",
            r"has the weights IMAGENET1K_V1, IMAGENET1K_V2 of it\. Received: 'torchvision:resnet50",
        ),
    ],
)
def test_unknown_names_are_refused(source: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=WHY)

    with pytest.raises(ConfigError, match=message):
        opened(source, tmp_path)


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_torchvision_becomes_a_bundle_s_model(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason=WHY)
    import torch

    torch.manual_seed(3)
    module = torchvision.models.get_model("mobilenet_v3_small", weights=None, num_classes=6).eval()
    torch.nn.init.normal_(module.classifier[-1].weight, std=3)
    state = {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in module.state_dict().items()}

    found = opened(
        "torchvision:mobilenet_v3_small", tmp_path, checkpoint=saved(module, tmp_path / "w", model_ema=state)
    )

    facts = found.facts
    assert (facts.num_outputs, facts.class_names, facts.features is not None) == (6, None, True)
    assert (facts.resize, facts.resize_px, facts.height_px, facts.interpolation) == (
        "shortest-edge",
        256,
        224,
        "bilinear",
    )
    recipe, (probabilities, _) = bundle_outputs(found, tmp_path)
    transform = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in _files(tmp_path)])
        expected = module(batch).softmax(1).numpy()
    assert found.reference is not None
    assert np.abs(found.reference(photographs(), recipe.asked) - expected).max() < 1e-6
    assert np.abs(probabilities - expected).max() < 1e-4


def test_the_weights_that_decide_about_pixels_are_named_or_told(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason=WHY)
    table = torchvision.models.get_model_weights("resnet50")

    def chosen(tag: str, checkpoint: str | None) -> tuple[Any, tuple[str, ...]]:
        job = ImportJob(source="torchvision:resnet50", output="b", checkpoint=checkpoint)
        return torchvision_models._weights(table, tag, job)

    assert chosen("IMAGENET1K_V1", "x.pth") == (table.IMAGENET1K_V1, ())
    assert chosen("", "/data/resnet50-0676ba61.pth") == (table.IMAGENET1K_V1, ())
    weights, why = chosen("", "own.pth")
    assert weights == table.IMAGENET1K_V2
    assert "as for torchvision's IMAGENET1K_V2; for another way, name the weights" in why[0]


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def test_a_pickle_that_needs_more_than_tensors_executes_nothing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("timm", reason=WHY)
    canary = tmp_path / "canary"
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"state_dict": Canary(canary)}))
    torch.save({"state_dict": Canary(canary)}, tmp_path / "zip.pth")

    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(WeightsError, match="could run any code, so it was not loaded"):
            opened(f"timm:{TINY}", tmp_path, checkpoint=str(tmp_path / name))

    assert not canary.exists()


def test_bad_checkpoints_are_explained(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("timm", reason=WHY)
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "numbers")
    saved(tiny(name="test_vit"), tmp_path / "other")
    saved(tiny(in_chans=4), tmp_path / "planes")

    for name, message in (
        ("gone", "there is no such checkpoint"),
        ("text", "it was not loaded|this is no file of torch"),
        ("broken.safetensors", "the safetensors file cannot be read"),
        ("list", r"holds tensors by name\. Received: list"),
        ("numbers", r"holds tensors by name\. Received: \['a'\]"),
        ("planes", "the model takes 4 channels"),
        ("other", r"these are not weights of test_resnet: \d+ tensors are missing \(.*\), \d+ have no place"),
    ):
        with pytest.raises(WeightsError, match=message):
            opened(f"timm:{TINY}", tmp_path, checkpoint=str(tmp_path / name))


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason=WHY)
    module = tiny()
    safetensors.save_file(module.state_dict(), str(tmp_path / "weights.bin"))

    facts: Facts = opened(f"timm:{TINY}", tmp_path, checkpoint=str(tmp_path / "weights.bin")).facts

    assert replace(facts, why=()).num_outputs == 7
