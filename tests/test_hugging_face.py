"""Hugging Face folders: what their files say, in all their ages, which outputs count, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from corpus import encoded
from foreign_models import CLASSES, SIDE_PX, edited, foreign_onnx
from onnx import TensorProto, helper
from PIL import Image

import mnist_dist
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import FittingConfig, ImportJob
from mnist_dist.importing.as_stated import is_as_stated, opened
from mnist_dist.importing.foreign import Asked, Facts, Foreign
from mnist_dist.importing.hf_processors import Processor, processor
from mnist_dist.importing.hugging_face import open_hugging_face
from mnist_dist.importing.recipe import recipe_of

LABELS = {str(number): name for number, name in enumerate(("ant", "bee", "cat", "dog", "eel"))}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
B32 = {"height": 32, "width": 32}

# Files as they were published, of all ages: model_type, the file, then resize, resize_px, height and filter.
FILES: dict[str, tuple[str, dict[str, Any], tuple[str, int | None, int, str]]] = {
    "ViT without a class": ("vit", {"size": 224, **HALF}, ("stretch", None, 224, "bilinear")),
    "ViT": (
        "vit",
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 384, "width": 384}, "resample": 2, **HALF},
        ("stretch", None, 384, "bilinear"),
    ),
    "Swin": (
        "swin",
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 3, **IMAGENET},
        ("stretch", None, 224, "bicubic"),
    ),
    "DeiT": (
        "deit",
        {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "resample": 3, **IMAGENET},
        ("stretch", 256, 224, "bicubic"),
    ),
    "BEiT": (
        "beit",
        {"feature_extractor_type": "BeitFeatureExtractor", "size": 224, "do_center_crop": False, "resample": 2, **HALF},
        ("stretch", None, 224, "bilinear"),
    ),
    "ResNet": (
        "resnet",
        {
            "feature_extractor_type": "ConvNextFeatureExtractor",
            "size": 224,
            "crop_pct": 0.875,
            "resample": 3,
            **IMAGENET,
        },
        ("shortest-edge", 256, 224, "bicubic"),
    ),
    "ConvNeXT 384": (
        "convnext",
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 384},
            "crop_pct": 0.95,
            "resample": 3,
            **IMAGENET,
        },
        ("stretch", None, 384, "bicubic"),
    ),
    "CLIP": (
        "clip",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3, **CLIP},
        ("shortest-edge", 224, 224, "bicubic"),
    ),
    "DINOv2": (
        "dinov2",
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
            **IMAGENET,
        },
        ("shortest-edge", 256, 224, "bicubic"),
    ),
    "SigLIP": (
        "siglip",
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}, **HALF},
        ("stretch", None, 224, "bicubic"),
    ),
    "LeViT": (
        "levit",
        {"feature_extractor_type": "LevitFeatureExtractor", "size": 224, "do_center_crop": True, **IMAGENET},
        ("shortest-edge", 256, 224, "bicubic"),
    ),
    "PoolFormer": (
        "poolformer",
        {"feature_extractor_type": "PoolFormerFeatureExtractor", "size": 224, "crop_pct": 0.9, **IMAGENET},
        ("shortest-edge", 248, 224, "bicubic"),
    ),
    "MobileNetV2": (
        "mobilenet_v2",
        {"image_processor_type": "MobileNetV2ImageProcessorFast", "size": {"shortest_edge": 256}, **HALF},
        ("shortest-edge", 256, 224, "bilinear"),
    ),
    "EfficientNet": (
        "efficientnet",
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "size": B32,
            "resample": 0,
            "include_top": False,
            **HALF,
        },
        ("stretch", None, 32, "nearest"),
    ),
    "BLIP, unknown here": (
        "blip",
        {"image_processor_type": "BlipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3, **CLIP},
        ("stretch", None, 384, "bicubic"),
    ),
}


def read(content: dict[str, Any], model_type: str | None = None) -> Processor:
    return processor(content, model_type=model_type, path="p.json")


def photograph(width: int = 61, height: int = 47, mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(1).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def by_facts(image: Image.Image, facts: Facts) -> Any:
    """What facts mean, in lines of a test's own."""
    height, width = facts.height_px or 0, facts.width_px or 0
    resized = (width, height)
    if facts.resize == "shortest-edge":
        edge = facts.resize_px or 0
        tall = image.height >= image.width
        resized = (
            (edge, int(edge * image.height / image.width)) if tall else (int(edge * image.width / image.height), edge)
        )
    elif facts.resize_px is not None:
        resized = (facts.resize_px, facts.resize_px)
    image = image.resize(resized, Image.Resampling[(facts.interpolation or "").upper()])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float64)
    if facts.bgr:
        pixels = pixels[..., ::-1]
    return (pixels * np.array(facts.scale) + np.array(facts.offset)).transpose(2, 0, 1)


# --- image processors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_ages_and_classes_say_how_images_are_fitted(name: str) -> None:
    model_type, content, expected = FILES[name]

    facts = read(content, model_type).facts()

    assert (facts.resize, facts.resize_px, facts.height_px, facts.interpolation) == expected
    assert (facts.resampling, facts.crop_rounding, facts.bgr) == ("pillow", "down", False)
    mean, std = np.array(content["image_mean"]), np.array(content["image_std"])
    assert np.allclose(facts.scale or (), 1 / 255 / std, rtol=1e-12)
    assert np.allclose(facts.offset or (), -mean / std, rtol=1e-12)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [(61, 47), (301, 450)])
def test_facts_are_what_the_steps_do(name: str, size: tuple[int, int]) -> None:
    model_type, content, _ = FILES[name]
    steps = read(content, model_type)

    found = steps.prepare(photograph(*size))

    assert np.abs(found - by_facts(photograph(*size), steps.facts())).max() < 1e-6


@pytest.mark.parametrize("name", FILES)
def test_the_steps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers; run in the environment of [torch]")
    model_type, content, _ = FILES[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    theirs = transformers.AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")

    values = theirs(images=[photograph()], return_tensors="np")["pixel_values"][0]

    assert np.abs(read(content, model_type).prepare(photograph()) - values).max() < 1e-6


def test_special_normalisations_are_read() -> None:
    whole = {"do_resize": True, "size": B32, "resample": 2}
    efficient = {"image_processor_type": "EfficientNetImageProcessor", **whole, **HALF}

    again = read(efficient).facts()  # divides by the standard deviation twice
    shifted = read(
        efficient | {"rescale_factor": 2 / 255, "rescale_offset": True, "do_normalize": False, "include_top": False}
    )
    raw = read(
        {"image_processor_type": "ViTImageProcessor", **whole, "do_rescale": False, "do_normalize": False}
    ).facts()
    grey = read({"image_processor_type": "ViTImageProcessor", **whole, "image_mean": 0.5, "image_std": [0.25]}).facts()
    apple = read(
        {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 288}, "resample": 2}
    ).facts()

    assert np.allclose(again.scale or (), 4 / 255)
    assert np.allclose(again.offset or (), -2)
    assert np.allclose((shifted.facts().scale or (), shifted.facts().offset or ()), ((2 / 255,), (-1,)))
    assert (raw.scale, raw.offset) == ((1.0,), (0.0,))
    assert np.allclose((grey.scale or (), grey.offset or ()), ((4 / 255,), (-2,)))
    assert (apple.bgr, apple.resize_px, apple.height_px) == (True, 288, 256)
    assert np.allclose((apple.scale or (), apple.offset or ()), ((1 / 255,), (0,)))


def test_what_the_class_or_nobody_says_is_told() -> None:
    (defaults,) = read({"feature_extractor_type": "CLIPFeatureExtractor", **CLIP}).why
    assert (
        "leaves out size (224), resample (bicubic), crop_size (224): defaults of the image processor 'CLIP'" in defaults
    )
    (unknown,) = read(FILES["BLIP, unknown here"][1]).why
    assert "'Blip' is not known here; these fields were obeyed: image_processor_type, size, resample" in unknown
    kept = read({"image_processor_type": "ViTImageProcessor", "do_resize": False, **HALF})
    assert "do_resize=false" in kept.why[0]
    assert (kept.is_fixed, kept.facts().resize) == (False, None)
    fast = read({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": B32, "resample": 2, **IMAGENET})
    assert "resizes with torch" in fast.why[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": {"longest_edge": 224}}, r"p\.json: size must be a number, .* Received: size=\{'longest_edge': 224\}"),
        ({"size": [224]}, r"size must be a number, \[height, width\]"),
        ({"size": 0}, r"size must be at least 1 px\. Received: size=0"),
        ({"resample": 9}, r"resample must be 0 \(nearest\) to 5 \(hamming\)\. Received: resample=9"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean must be 1 or 3 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std must be positive"),
        ({"size": 224, "do_center_crop": True, "crop_size": 256}, r"crop_size must be at most the size after resizing"),
        ({"do_center_crop": True}, r"crop_size must be there, since do_center_crop is true"),
        (
            {"size": {"height": 64, "width": 48}, "do_center_crop": True, "crop_size": 32},
            r"size must be a square, where a crop follows",
        ),
        (
            {"image_processor_type": "PerceiverImageProcessor"},
            "Perceiver's image processor has a rule that a bundle does",
        ),
        (
            {"image_processor_type": "OwnImageProcessor", "size": 8},
            r"'Own' are not known, .* have the field 'resample'",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "resample": 2, "crop_pct": 0},
            r"crop_pct must be in \(0, 1\]",
        ),
    ],
)
def test_fields_that_no_bundle_obeys_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read({"image_processor_type": "ViTImageProcessor", **content})


UNKNOWN = {"image_processor_type": "OwnImageProcessor", "size": B32, "resample": 2, **HALF}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_aspect_ratio", True),
        ("ensure_multiple_of", 32),
        ("size_divisor", 32),
        ("crop_pct", 0.9),
        ("pad_size", {"height": 40, "width": 40}),
        ("do_thumbnail", True),
    ],
)
def test_a_geometry_of_unknown_processors_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"'Own' fits images by a rule that is not .*--resize.*Received: {field}="):
        read({**UNKNOWN, field: value})


def test_what_unknown_processors_ask_for_in_vain_is_told() -> None:
    idle = {"keep_aspect_ratio": False, "ensure_multiple_of": 1, "do_pad": False, "pad_size": B32, "crop_pct": None}

    (obeyed, ignored) = read({**UNKNOWN, **idle, "do_grayscale": True, "do_convert_rgb": True}).why

    assert obeyed.endswith("obeyed: image_processor_type, size, resample, image_mean, image_std, do_pad")
    assert ignored == "these fields of the image processor 'Own' were not obeyed: do_grayscale"


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("ConvNext", {"size": 224}, "resample"),
        ("MobileViT", {"size": 288}, "resample"),
        ("Pvt", {"size": 224}, "resample"),
        ("EfficientNet", {"size": 224}, "resample"),
        ("Beit", {"do_center_crop": False}, "size"),
        ("Beit", {"size": 224}, "do_center_crop"),
    ],
)
def test_defaults_that_differ_between_versions_are_asked_for(name: str, content: dict[str, Any], field: str) -> None:
    content = {"image_processor_type": f"{name}ImageProcessor", **content}

    with pytest.raises(
        ConfigError, match=rf"write '{field}' into the file, .* \(.*transformers 4\) or .*: no '{field}' in"
    ):
        read(content)

    stated = {"resample": 0, "size": 256, "do_center_crop": True}
    steps = read({**content, field: stated[field]})
    if name == "Beit":
        assert steps.crop == (None if content.get("do_center_crop") is False else (224, 224))
    else:
        assert steps.resample == 0
        assert not read({**content, "do_resize": False}).is_fixed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": "large"}, r"p\.json is not a ProcessorFile: .*at `\$\.size`"),
        ({"resample": "bicubic"}, r"at `\$\.resample`"),
        ({"image_mean": ["a"]}, r"at `\$\.image_mean"),
    ],
)
def test_fields_of_a_wrong_type_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(content)


# --- folders ---------------------------------------------------------------------------------------------------------


def hf_folder(path: Path, *, config: Any = None, steps: Any = None, model: str = "onnx/model.onnx", **net: Any) -> Path:
    """A folder as `optimum` and the model hub have them; `net` goes to `foreign_onnx`."""
    foreign_onnx(path / model, **net)
    labels = {"model_type": "vit", "id2label": LABELS}
    vit = {"image_processor_type": "ViTImageProcessor", "size": B32, "resample": 3, **IMAGENET}
    (path / "config.json").write_text(json.dumps(labels if config is None else config))
    (path / "preprocessor_config.json").write_text(json.dumps(vit if steps is None else steps))
    return path


def opened_folder(path: Path, **flags: Any) -> Foreign:
    scratch = path.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return open_hugging_face(ImportJob(source=str(path), output="bundle", **flags), scratch, lambda done, total: None)


def asked_of(facts: Facts, **changes: Any) -> Asked:
    """What a bundle of these facts asks of the original."""
    spec = ImageSpec(
        height_px=facts.height_px or 0,
        width_px=facts.width_px or 0,
        channels=facts.channels or 0,
        resize=facts.resize or "stretch",
        resize_px=facts.resize_px,
        resampling="pillow",
        interpolation=facts.interpolation or "bilinear",
        crop_rounding=facts.crop_rounding or "even",
        quality="exact",
    )
    asked = Asked(
        spec=spec,
        scale=facts.scale or (),
        offset=facts.offset or (),
        bgr=bool(facts.bgr),
        activation=facts.activation or ("softmax" if facts.output else "none"),
        output=facts.output,
    )
    return replace(asked, **changes)


def test_a_folder_says_classes_pixels_and_outputs(tmp_path: Path) -> None:
    ten = {str(number): f"name {number}" for number in (10, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9)}
    folder = hf_folder(tmp_path / "net", config={"model_type": "vit", "id2label": ten}, classes=11)
    (folder / "onnx" / "model_quantized.onnx").write_bytes(b"other")

    found = opened_folder(folder)

    facts = found.facts
    assert (found.kind, found.name, found.file) == ("hugging_face", "net", folder / "onnx" / "model.onnx")
    assert facts.class_names == tuple(f"name {number}" for number in range(11))
    assert (facts.height_px, facts.width_px, facts.channels, facts.num_outputs) == (SIDE_PX, SIDE_PX, 3, 11)
    assert (facts.activation, facts.multi_label, facts.output, facts.features) == (None, None, "logits", "pooled")
    assert facts.is_size_fixed
    assert facts.why == ("of several ONNX files, onnx/model.onnx was taken, not onnx/model_quantized.onnx",)


@pytest.mark.parametrize(
    ("problem", "final", "expected"),
    [
        ("multi_label_classification", None, ("sigmoid", True)),
        ("single_label_classification", None, ("softmax", False)),
        ("regression", None, (None, None)),
        (None, "Sigmoid", ("none", True)),
        (None, "Softmax", ("none", False)),
        ("single_label_classification", "Sigmoid", ("none", False)),
    ],
)
def test_the_problem_type_and_the_graph_say_what_follows_the_output(
    tmp_path: Path, problem: str | None, final: str | None, expected: tuple[str | None, bool | None]
) -> None:
    config = {"model_type": "vit", "problem_type": problem}

    facts = opened_folder(hf_folder(tmp_path / "net", config=config, activation=final)).facts

    assert (facts.activation, facts.multi_label, facts.class_names) == (*expected, None)


def test_several_labels_an_image_may_be_asked_for_where_no_file_says_it(tmp_path: Path) -> None:
    found = opened_folder(hf_folder(tmp_path / "net"))
    job = ImportJob(source="net", output="bundle")

    usual, several = (recipe_of(one, found, classes=None) for one in (job, replace(job, multi_label=True)))

    assert (usual.activation, usual.multi_label, several.activation, several.multi_label) == (
        "softmax",
        False,
        "sigmoid",
        True,
    )
    assert any("softmax follows" in sentence for sentence in usual.assumed)


def test_names_that_name_nothing_are_told(tmp_path: Path) -> None:
    config = {"model_type": "vit", "id2label": {str(number): f"LABEL_{number}" for number in range(CLASSES)}}

    facts = opened_folder(hf_folder(tmp_path / "net", config=config)).facts

    assert "no class names but LABEL_0 and so on" in facts.why[-1]


def test_the_reference_is_ten_lines_of_one_s_own(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net", model="model.onnx")
    images = [photograph(61, 47), photograph(32, 90, "L"), photograph(200, 33)]
    found = opened_folder(folder)
    assert found.reference is not None

    values = found.reference([encoded(image, "PNG") for image in images], asked_of(found.facts))

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for image, row in zip(images, values, strict=True):
        pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
        mean, std = (np.array(IMAGENET[name], np.float32) for name in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
        (logits,) = session.run(None, {"pixels": pixels.transpose(2, 0, 1)[None]})
        powers = np.exp(logits[0] - logits[0].max())
        assert np.abs(row - powers / powers.sum()).max() < 1e-5
    assert len({int(row.argmax()) for row in values}) > 1 or np.ptp(values, axis=0).max() > 0.01


def test_flags_that_change_the_pixels_change_the_reference_too(tmp_path: Path) -> None:
    found = opened_folder(hf_folder(tmp_path / "net"))
    data = [encoded(photograph(), "PNG")]
    asked = asked_of(found.facts)
    assert found.reference is not None
    assert is_as_stated(asked, found.facts)

    stated, other = (found.reference(data, one) for one in (asked, replace(asked, scale=(0.001,))))

    assert np.abs(stated - other).max() > 1e-3
    for change in (
        {"interpolation": "nearest"},
        {"resize": "shortest-edge", "resize_px": 40},
        {"crop_rounding": "even"},
    ):
        assert not is_as_stated(replace(asked, spec=replace(asked.spec, **change)), found.facts)


def test_images_are_opened_upright_and_over_white() -> None:
    turned, glass = Image.Exif(), Image.new("RGBA", (5, 4), (0, 0, 0, 0))
    turned[0x0112] = 6

    upright = opened(encoded(photograph(9, 5), "PNG", exif=turned), channels=3)

    assert upright.size == (5, 9)
    assert np.asarray(opened(encoded(glass, "PNG"), channels=3)).min() == 255
    assert opened(encoded(glass, "PNG"), channels=1).mode == "L"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_images_of_16_bits_are_scaled_not_clipped(format: str) -> None:
    levels = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)

    image = opened(encoded(Image.fromarray(levels), format), channels=3)

    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert np.abs(np.asarray(image)[..., 0] - levels / 257).max() <= 1


def test_images_that_pillow_cannot_read_are_opened_as_for_the_bundle() -> None:
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra [formats]")
    pixels = np.asarray(photograph())

    image = opened(imagecodecs.jpegxl_encode(pixels, lossless=True), channels=3)

    assert np.array_equal(np.asarray(image), pixels)


def test_a_processor_without_a_size_needs_a_flag(tmp_path: Path) -> None:
    steps = {"image_processor_type": "ViTImageProcessor", "do_resize": False, **HALF}
    folder = hf_folder(tmp_path / "net", steps=steps, config={"id2label": LABELS, "image_size": 32}, side="side")

    with pytest.raises(ConfigError, match=r"gives images no fixed size; choose how they are fitted with --resize"):
        opened_folder(folder)

    found = opened_folder(folder, fitting=FittingConfig(resize="stretch"))
    assert (found.facts.height_px, found.facts.is_size_fixed, found.facts.resize) == (32, False, None)
    assert found.reference is not None
    values = found.reference([encoded(photograph(), "PNG")], asked_of(found.facts))
    assert values.shape == (1, CLASSES)


def test_the_processor_may_stand_in_another_file(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net")
    steps = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": steps}))

    assert opened_folder(folder).facts.interpolation == "bicubic"

    (folder / "processor_config.json").write_text(json.dumps({"image_processor": 3, "tokenizer": {}}))
    with pytest.raises(
        DataError, match=r"processor_config\.json has no image_processor\. Received: image_processor, token"
    ):
        opened_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"needs config\.json, preprocessor_config\.json and an ONNX file.* no config\.json in"),
        ("preprocessor_config.json", None, r"no preprocessor_config\.json in"),
        ("onnx/model.onnx", None, r"needs model\.onnx or onnx/model\.onnx; .*Received: no \.onnx file in"),
        ("config.json", b"{", r"config\.json is not a ModelFile: "),
        ("config.json", b"[1]", r"config\.json is not a ModelFile: Expected `object`"),
        ("config.json", b"\xff\xfe", r"config\.json is not a ModelFile: "),
        ("config.json", b'{"id2label": ["ant"]}', r"at `\$\.id2label`"),
        ("config.json", b'{"id2label": {"0": "a", "2": "b"}}', r"the keys of id2label must be 0 to 1\. Received: 0, 2"),
        ("preprocessor_config.json", b"null", r"preprocessor_config\.json is not a dict: Expected `object`"),
        ("preprocessor_config.json", b'{"size": 64}', r"makes images of 64 x 64 px, the model takes 32 x 32"),
    ],
)
def test_bad_and_missing_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = hf_folder(tmp_path / "net") / name
    path.unlink() if content is None else path.write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        opened_folder(tmp_path / "net")


# --- outputs ---------------------------------------------------------------------------------------------------------


def renamed(path: Path, names: Sequence[tuple[str, str]]) -> None:
    """Gives tensors of a model other names."""
    model = onnx.load(str(path))
    for old, new in names:
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        for value in model.graph.output:
            value.name = new if value.name == old else value.name
    onnx.save(model, str(path))


def test_a_model_of_features_is_a_backbone_only(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net", hidden=True)
    path = folder / "onnx" / "model.onnx"
    renamed(path, [("pooled", "pooler_output"), ("logits", "last_hidden_state")])

    with pytest.raises(
        ConfigError, match=r"no output logits; .*--backbone-only if it gives features\. Received: last_hidd"
    ):
        opened_folder(folder)

    facts = opened_folder(folder, backbone_only=True).facts
    assert (facts.output, facts.features, facts.class_names, facts.activation) == (None, "pooler_output", None, None)
    assert "features are the output pooler_output" in facts.why


def test_the_first_of_many_tokens_stands_for_the_image(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net", config={"model_type": "dinov2"})
    path = folder / "onnx" / "model.onnx"
    tokens = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", 1, CLASSES])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    unsqueeze = helper.make_node("Unsqueeze", ["logits", "axes"], ["last_hidden_state"])

    def add_tokens(graph: Any) -> None:
        graph.node.append(unsqueeze)
        graph.initializer.append(axes)
        del graph.output[:]
        graph.output.append(tokens)

    edited(path, graph=add_tokens)

    found = opened_folder(folder, backbone_only=True)

    assert found.facts.features == "cls_features"
    assert "features are the first token of last_hidden_state" in found.facts.why[0]
    onnx.checker.check_model(str(found.file), full_check=True)
    assert found.reference is not None
    values = found.reference([encoded(photograph(), "PNG")], asked_of(found.facts))
    assert values.shape == (1, CLASSES)

    (folder / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ConfigError, match=r"no output that is known to hold features; .*--features-node"):
        opened_folder(folder, backbone_only=True)


def test_several_inputs_are_refused_but_a_vision_model_beside_is_taken(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net", hidden=True)
    more = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 7])
    edited(folder / "onnx" / "model.onnx", graph=lambda graph: graph.input.append(more))

    with pytest.raises(ConfigError, match="one input"):
        opened_folder(folder)

    foreign_onnx(folder / "onnx" / "vision_model.onnx", hidden=True)
    renamed(folder / "onnx" / "vision_model.onnx", [("pooled", "image_embeds")])
    found = opened_folder(folder, backbone_only=True)
    assert (found.file.name, found.facts.features) == ("vision_model.onnx", "image_embeds")


def test_an_inner_tensor_may_be_the_output(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net", activation="Softmax")
    found = opened_folder(folder, output_node="logits")
    assert found.reference is not None

    values = found.reference([encoded(photograph(), "PNG")], asked_of(found.facts, activation="none"))

    assert values.shape == (1, CLASSES)
    assert abs(values.sum() - 1) > 1e-3
    with pytest.raises(ConfigError, match=r"no tensor of that name .* --output-node 'nothing'"):
        opened_folder(folder, output_node="nothing")


def test_a_model_that_takes_pixels_as_they_are_is_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "net", dtype=TensorProto.UINT8)

    with pytest.raises(
        ConfigError, match=r"import the ONNX file by its own path\. Received: the input 'pixels' is uint8"
    ):
        opened_folder(folder)


def test_a_folder_becomes_a_bundle(tmp_path: Path) -> None:
    steps = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 41}, "crop_size": B32, **IMAGENET}
    folder = hf_folder(tmp_path / "net", steps=steps)

    result = mnist_dist.import_model(folder, output=tmp_path / "bundle")

    (compared, *_) = result.values["compared"]
    assert compared["max_abs_difference"] < 1e-5
    info = result.bundle().info
    assert info.class_names == tuple(LABELS.values())
    assert (info.spec.resize, info.spec.resize_px, info.spec.crop_rounding) == ("shortest-edge", 41, "down")
    assert info.imported is not None
    assert info.imported.kind == "hugging_face"
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json in"):
        mnist_dist.import_model(folder, output=tmp_path / "other")


def test_code_in_a_folder_is_never_executed(tmp_path: Path) -> None:
    steps = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}, "size": B32, "resample": 2}
    folder = hf_folder(tmp_path / "net", steps={**steps, **HALF})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")

    found = opened_folder(folder)

    assert found.reference is not None
    found.reference([encoded(photograph(), "PNG")], asked_of(found.facts))
    assert "Pillow and NumPy" in found.reference_name
    assert not (tmp_path / "canary").exists()
