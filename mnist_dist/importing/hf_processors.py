"""Image processors of Hugging Face: what `preprocessor_config.json` does to an image.

Owns: the file's fields in all their ages, the defaults of the processor classes, and the rule that follows from them,
as the slow (Pillow) processors of transformers apply it. Does not own: the model beside it (`hugging_face`).

Source: transformers 4.30, 4.57 and 5.24, `image_processing_*.py` of each model, and `image_transforms.py`. Where their
defaults differ, the file must have the field.
"""

# H = height px, W = width px, C = channels; h, w = height, width of an original

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mnist_dist import documents
from mnist_dist.config import Interpolation
from mnist_dist.errors import ConfigError
from mnist_dist.importing.foreign import Facts

PROCESSOR_FILE = "preprocessor_config.json"
_FILTERS: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By Pillow's number, which `resample` holds."""
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CONVNEXT_WHOLE_PX = 384  # From this size on, ConvNeXT's processor stretches the whole image.

Size = int | list[int] | dict[str, int | None]
Channels = float | list[float]


@dataclass(frozen=True, kw_only=True)
class ProcessorFile:
    """The fields of `preprocessor_config.json` that decide what the model sees; None: the class' default counts."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool | None = None
    size: Size | None = None
    resample: int | None = None
    do_center_crop: bool | None = None
    crop_size: Size | None = None
    crop_pct: float | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    rescale_offset: bool | None = None
    do_normalize: bool | None = None
    image_mean: Channels | None = None
    image_std: Channels | None = None
    include_top: bool | None = None
    do_flip_channel_order: bool | None = None
    do_pad: bool | None = None


@dataclass(frozen=True, kw_only=True)
class _Class:
    """Defaults of a processor class, and what it does beside the common rule."""

    size: Size
    resample: int = 3
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    crop_size: Size | None = None
    """None: no crop by default."""
    is_edge: bool = False
    """A single number is the length of the shorter side, not of both sides."""
    crop_pct: float | None = None
    widen: float = 1
    """The shorter side is that much longer than `size` says."""
    flips: bool = False
    normalizes: bool = True
    """False: never, whatever the file says."""
    include_top: bool = False
    unsettled: tuple[tuple[str, str], ...] = ()
    """Fields whose default differs between versions of transformers, and what may stand there."""


_FILTER_CHANGED = (("resample", "2 (bilinear, as in transformers 4) or 3 (bicubic, as in transformers 5)"),)
_VIT = _Class(size=224, resample=2)
_CLIP = _Class(size=224, mean=_CLIP_MEAN, std=_CLIP_STD, crop_size=224, is_edge=True)
_MOBILENET = _Class(size=256, resample=2, crop_size=224, is_edge=True)
_CLASSES: Mapping[str, _Class] = {
    "ViT": _VIT,
    "DeiT": _Class(size=256, crop_size=224),
    "Beit": _Class(
        size=224,
        crop_size=224,
        unsettled=(
            ("size", "256 (as in transformers 4) or 224 (as in transformers 5)"),
            ("do_center_crop", "true (as in transformers 4) or false (as in transformers 5)"),
        ),
    ),
    "Siglip": _Class(size=224),
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Bit": _CLIP,
    "ViTHybrid": _CLIP,
    "ConvNext": _Class(size=384, is_edge=True, crop_pct=224 / 256, unsettled=_FILTER_CHANGED),
    "PoolFormer": _Class(size=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, crop_size=224, is_edge=True, crop_pct=0.9),
    "Levit": _Class(size=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, crop_size=224, is_edge=True, widen=256 / 224),
    "EfficientNet": _Class(
        size=346,
        include_top=True,
        unsettled=(("resample", "0 (nearest, as in transformers 4) or 3 (bicubic, as in transformers 5)"),),
    ),
    "EfficientFormer": _Class(size=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, crop_size=224),
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "MobileViT": _Class(size=224, crop_size=256, is_edge=True, flips=True, normalizes=False, unsettled=_FILTER_CHANGED),
    "Pvt": _Class(size=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, unsettled=_FILTER_CHANGED),
    "Segformer": _Class(size=512, resample=2, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "DINOv3ViT": _Class(size=224, resample=2, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
}
_ONLY_FAST = frozenset({"DINOv3ViT"})
"""Classes without a slow version: their resize is torch's, on floats."""
_OF_MODELS: Mapping[str, str] = {
    **dict.fromkeys(("vit", "swin", "swinv2", "vit_msn", "vit_mae", "dinat", "ijepa", "swiftformer"), "ViT"),
    **dict.fromkeys(("convnext", "convnextv2", "resnet", "regnet", "cvt", "van"), "ConvNext"),
    **dict.fromkeys(("bit", "dinov2", "dinov2_with_registers", "focalnet", "hiera"), "Bit"),
    **dict.fromkeys(("clip", "clip_vision_model", "metaclip_2"), "CLIP"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("pvt", "pvt_v2"), "Pvt"),
    **dict.fromkeys(("mobilevit", "mobilevitv2"), "MobileViT"),
    "deit": "DeiT",
    "efficientformer": "EfficientFormer",
    "efficientnet": "EfficientNet",
    "levit": "Levit",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "poolformer": "PoolFormer",
    "segformer": "Segformer",
    "vit_hybrid": "ViTHybrid",
}
"""Processor class by `model_type` of `config.json`, for files that do not name their class."""
_OTHER_RULES = frozenset(
    {"Perceiver", "ImageGPT", "Siglip2", "Vilt", "Pix2Struct", "TextNet", "VideoMAE", "Owlv2", "Nougat", "Donut"}
)
"""Classes whose rule no bundle has: a crop before the resize, patches, colour clusters, sides that vary."""
_OF_ONE_CLASS = frozenset({"crop_pct", "include_top", "rescale_offset"})
"""Fields that other classes do not have."""
_GEOMETRY = ("size", "crop", "ratio", "pad", "multiple", "divis", "_pixels", "align", "thumbnail", "split")
"""Parts of the names of fields that say how images are fitted."""
_ASKS_NOTHING = (None, False, 0, 1)
_HARMLESS = frozenset({"do_convert_rgb", "do_reduce_labels"})


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What a processor does, step by step."""

    name: str
    """Class name, without what it ends with."""
    resize: int | tuple[int, int] | None
    """Length of the shorter side, or height and width, px; None: images keep their size."""
    resample: int
    """Pillow's number of the filter."""
    crop: tuple[int, int] | None
    """Height and width of the crop at the centre, px."""
    factor: float
    """Pixels are multiplied by this,"""
    shift: float
    """then this is added,"""
    mean: tuple[float, ...]
    """this is subtracted,"""
    std: tuple[float, ...]
    """and it is divided by this."""
    flips: bool
    """Channels become BGR."""
    why: tuple[str, ...] = ()
    """Sentences for the user."""

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every prepared image, px; None: they vary."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    @property
    def is_fixed(self) -> bool:
        """Whether every image is resized, and comes out with one size."""
        return self.resize is not None and self.output_size is not None

    def facts(self) -> Facts:
        """The same as facts; without the resize rule unless `is_fixed`."""
        height, width = self.output_size or (None, None)
        std, mean = np.array(self.std), np.array(self.mean)
        values = Facts(
            height_px=height,
            width_px=width,
            resampling="pillow",
            interpolation=_FILTERS[self.resample],
            antialias=True,
            crop_rounding="down",
            scale=tuple((self.factor / std).tolist()),
            offset=tuple(((self.shift - mean) / std).tolist()),
            bgr=self.flips,
            why=self.why,
        )
        return replace(values, **self._geometry()) if self.is_fixed else values

    def _geometry(self) -> dict[str, Any]:
        if isinstance(self.resize, int):
            return {"resize": "shortest-edge", "resize_px": self.resize}
        resized, height = self.resize or (0, 0), (self.crop or (0, 0))[0]
        return {"resize": "stretch", "resize_px": resized[0] if self.crop and resized[0] != height else None}

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """An image, RGB or grey, as the model takes it, with Pillow and NumPy alone; needs `is_fixed`.

        Returns:
            `float32 [C, H, W]`.
        """
        if self.resize is not None:
            height, width = self.resize if isinstance(self.resize, tuple) else _edges(image, self.resize)
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is not None:
            top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = np.asarray(image, np.float64).reshape(image.height, image.width, -1)
        values = pixels * self.factor + self.shift
        if self.flips:
            values = values[..., ::-1]
        values = (values - np.array(self.mean)) / np.array(self.std)
        prepared: npt.NDArray[np.float32] = values.transpose(2, 0, 1).astype(np.float32)
        return prepared


def processor(content: Mapping[str, Any], *, model_type: str | None, path: str) -> Processor:
    """The steps that a file and the defaults of its class make.

    Args:
        content: the fields, by name.
        model_type: that of `config.json`, which stands in for a class that the file does not name.
        path: of the file, for messages.

    Raises:
        ConfigError: the class has a rule of its own, or a field is missing or has no meaning.
        DataError: a field has the wrong type.
    """
    file = documents.decode(documents.encode(content), ProcessorFile, uri=path)
    return _Reader(file=file, content=content, name=_class_name(file, model_type), path=path).read()


def _class_name(file: ProcessorFile, model_type: str | None) -> str:
    named = file.image_processor_type or file.feature_extractor_type
    if named is None:
        return _OF_MODELS.get(model_type or "", f"model {model_type}")
    for ending in ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor"):
        named = named.removesuffix(ending)
    return named


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Resolves one file."""

    file: ProcessorFile
    content: Mapping[str, Any]
    """All fields, of which `file` has those that are obeyed."""
    name: str
    path: str

    def read(self) -> Processor:
        if self.name in _OTHER_RULES:
            raise ConfigError(
                f"{self.name}'s image processor has a rule that a bundle does not have; import the ONNX file itself, "
                f"with flags such as --resize, --mean and --std. Received: {self.path!r}"
            )
        known = _CLASSES.get(self.name)
        kind = known or self._common()
        self._check_settled(kind)
        resize, resized_crop = self._resize(kind)
        factor, shift, mean, std = self._normalization(kind)
        made = Processor(
            name=self.name,
            resize=resize,
            resample=self._resample(kind),
            crop=self._crop(kind) or resized_crop,
            factor=factor,
            shift=shift,
            mean=mean,
            std=std,
            flips=bool(_either(self.file.do_flip_channel_order, kind.flips)) and (known is None or kind.flips),
            why=tuple(self._why(known, kind)),
        )
        self._check(made)
        return made

    def _common(self) -> _Class:
        """Of an unknown class: what nearly all classes do, if the file leaves nothing open."""
        file = self.file
        needed = {
            "size": file.do_resize is False or file.size is not None,
            "resample": file.do_resize is False or file.resample is not None,
            "image_mean": file.do_normalize is False or file.image_mean is not None,
            "image_std": file.do_normalize is False or file.image_std is not None,
            "crop_size": not file.do_center_crop or file.crop_size is not None,
        }
        missing = [name for name, there in needed.items() if not there]
        if missing:
            raise ConfigError(
                f"the defaults of the image processor {self.name!r} are not known, so {PROCESSOR_FILE} must have the "
                f"field {missing[0]!r}. Received: {self.path!r}"
            )
        self._check_unread()
        return _Class(size=224)

    def _check_unread(self) -> None:
        """Fields of an unknown class that change which part of an image the model sees, and how large."""
        if self.file.do_resize is False:
            return
        for name in self._unread():
            if any(part in name for part in _GEOMETRY) and not (self.file.do_pad is False and "pad" in name):
                raise ConfigError(
                    f"the image processor {self.name!r} fits images by a rule that is not known here; import the ONNX "
                    f"file itself, with flags such as --resize, --mean and --std. "
                    f"Received: {name}={self.content[name]!r} in {self.path!r}"
                )

    def _unread(self) -> list[str]:
        """Fields of an unknown class that ask for something, and are not obeyed."""
        obeyed = {item.name for item in fields(self.file)} - _OF_ONE_CLASS - {"do_pad"}
        asking = [name for name, value in self.content.items() if value is True or value not in _ASKS_NOTHING]
        return [name for name in asking if name not in obeyed]

    def _check_settled(self, kind: _Class) -> None:
        for name, choices in kind.unsettled:
            is_idle = self.file.do_resize is False and name in ("size", "resample")
            if getattr(self.file, name) is None and not is_idle:
                raise ConfigError(
                    f"the default of {name!r} of the image processor {self.name!r} differs between versions of "
                    f"transformers: write {name!r} into the file, {choices}. Received: no {name!r} in {self.path!r}"
                )

    def _resize(self, kind: _Class) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
        """The resize, and the crop that belongs to it."""
        if self.file.do_resize is False:
            return None, None
        size = self._size("size", _either(self.file.size, kind.size), is_edge=kind.is_edge)
        share = _either(self.file.crop_pct, kind.crop_pct)
        if share is not None and not 0 < share <= 1:
            raise self._wrong("crop_pct", "in (0, 1]")
        if self.name == "ConvNext":
            return self._convnext(size, share or 1.0)
        if self.name == "PoolFormer" and share:
            return int(self._single("size", size) / share), None
        return (int(kind.widen * size) if isinstance(size, int) else size), None

    def _convnext(
        self, size: int | tuple[int, int], share: float
    ) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
        edge = self._single("size", size)
        whole = (edge, edge)
        return (whole, None) if edge >= _CONVNEXT_WHOLE_PX else (int(edge / share), whole)

    def _single(self, name: str, size: int | tuple[int, int]) -> int:
        if isinstance(size, tuple) and size[0] != size[1]:
            raise self._wrong(name, f"one length with the image processor {self.name!r}")
        return size if isinstance(size, int) else size[0]

    def _crop(self, kind: _Class) -> tuple[int, int] | None:
        if not _either(self.file.do_center_crop, kind.crop_size is not None):
            return None
        size = _either(self.file.crop_size, kind.crop_size)
        if size is None:
            raise self._wrong("crop_size", "there, since do_center_crop is true")
        found = self._size("crop_size", size, is_edge=False)
        return (found, found) if isinstance(found, int) else found

    def _size(self, name: str, size: Size, *, is_edge: bool) -> int | tuple[int, int]:
        """Length of the shorter side, or height and width."""
        if isinstance(size, int):
            size = {"shortest_edge": size} if is_edge else {"height": size, "width": size}
        elif isinstance(size, list):
            size = {"height": size[0], "width": size[1]} if len(size) == 2 else {}
        given = {key: value for key, value in size.items() if value is not None}
        if any(value < 1 for value in given.values()):
            raise self._wrong(name, "at least 1 px")
        if set(given) == {"shortest_edge"}:
            return given["shortest_edge"]
        if set(given) == {"height", "width"}:
            return given["height"], given["width"]
        raise self._wrong(name, "a number, [height, width], {height, width} or {shortest_edge}")

    def _resample(self, kind: _Class) -> int:
        resample: int = _either(self.file.resample, kind.resample)
        if not 0 <= resample < len(_FILTERS):
            raise self._wrong("resample", "0 (nearest) to 5 (hamming)")
        return resample

    def _normalization(self, kind: _Class) -> tuple[float, float, tuple[float, ...], tuple[float, ...]]:
        """Factor, shift, mean and standard deviation."""
        file = self.file
        rescales = _either(file.do_rescale, True)
        factor = _either(file.rescale_factor, 1 / 255) if rescales else 1.0
        shift = -1.0 if rescales and self.name == "EfficientNet" and file.rescale_offset else 0.0
        mean, std = self._channels("image_mean", kind.mean), self._channels("image_std", kind.std)
        again = np.array(std) if kind.include_top and _either(file.include_top, True) else np.ones(1)
        if not self._normalizes(kind):
            mean, std = (0.0,), (1.0,)
        return factor, shift, mean, tuple((np.array(std) * again).tolist())

    def _normalizes(self, kind: _Class) -> bool:
        return kind.normalizes and self.file.do_normalize is not False

    def _channels(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = getattr(self.file, name)
        values = default if value is None else (float(value),) if isinstance(value, int | float) else tuple(value)
        if len(values) not in (1, 3):
            raise self._wrong(name, "1 or 3 numbers")
        if name == "image_std" and min(values) <= 0:
            raise self._wrong(name, "positive")
        return values

    def _why(self, known: _Class | None, kind: _Class) -> list[str]:
        sentences = []
        if known is None:
            unread, named = self._unread(), [item.name for item in fields(self.file)]
            used = ", ".join(name for name in named if self.content.get(name) is not None and name not in unread)
            sentences.append(f"the image processor {self.name!r} is not known here; these fields were obeyed: {used}")
            ignored = ", ".join(name for name in unread if name.startswith("do_") and name not in _HARMLESS)
            if ignored:
                sentences.append(f"these fields of the image processor {self.name!r} were not obeyed: {ignored}")
        else:
            taken = ", ".join(self._defaults(kind))
            if taken:
                sentences.append(f"{PROCESSOR_FILE} leaves out {taken}: defaults of the image processor {self.name!r}")
        if self.name in _ONLY_FAST:
            sentences.append(f"{self.name!r} resizes with torch, on floats; here Pillow does it, on 8 bits")
        if self.file.do_resize is False:
            sentences.append(f"{PROCESSOR_FILE} says do_resize=false: images are made the model's size in another way")
        if self.file.do_pad:
            sentences.append("do_pad is ignored: after this resize there is nothing to pad")
        return sentences

    def _defaults(self, kind: _Class) -> list[str]:
        """What the file leaves to its class, as `field (value)`."""
        file, shown = self.file, dict[str, object]()
        if file.do_resize is not False:
            shown |= {"size": kind.size} if file.size is None else {}
            shown |= {"resample": _FILTERS[kind.resample]} if file.resample is None else {}
        if self._normalizes(kind):
            shown |= {"image_mean": list(kind.mean)} if file.image_mean is None else {}
            shown |= {"image_std": list(kind.std)} if file.image_std is None else {}
        if kind.crop_size is not None and file.crop_size is None and file.do_center_crop is not False:
            shown["crop_size"] = kind.crop_size
        return [f"{name} ({value})" for name, value in shown.items()]

    def _check(self, made: Processor) -> None:
        """A bundle has no border around a crop, and one number for both sides before it."""
        if made.resize is None or made.crop is None:
            return
        sides = made.resize if isinstance(made.resize, tuple) else (made.resize, made.resize)
        if sides[0] < made.crop[0] or sides[1] < made.crop[1]:
            raise self._wrong("crop_size", f"at most the size after resizing, {sides[0]} x {sides[1]} px")
        if sides[0] != sides[1] and sides != made.crop:
            raise self._wrong("size", "a square, where a crop follows")

    def _wrong(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name} must be {expected}. Received: {name}={getattr(self.file, name)!r}")


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _edges(image: Image.Image, edge: int) -> tuple[int, int]:
    """Height and width with a shorter side of `edge` px."""
    if image.width <= image.height:
        return int(edge * image.height / image.width), edge
    return edge, int(edge * image.width / image.height)
