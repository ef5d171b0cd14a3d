"""The bundles that are combined: opened, and checked for what they need to have in common.

Owns: which bundles can be combined by which method, and what is said where they cannot. Does not own: the combination.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from mnist_dist.combining.architecture import first_difference, layers_of
from mnist_dist.config import CombineMethod, require
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BUNDLE_FILE, Bundle, BundleInfo, check_has_classes, load_bundle
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join
from mnist_dist.urls import shown

MAX_NAMES = 20  # of classes in a message


@dataclass(frozen=True)
class Member:
    """A bundle that is combined with others."""

    uri: str
    """Absolute URI of the bundle."""
    bundle: Bundle

    @property
    def info(self) -> BundleInfo:
        return self.bundle.info


def open_members(uris: Sequence[str]) -> list[Member]:
    """Opens bundles, or those in runs.

    Raises:
        BundleError: a folder holds no bundle.
    """
    found = [_bundle_uri(uri) for uri in uris]
    return [Member(uri, load_bundle(uri)) for uri in found]


def _bundle_uri(uri: str) -> str:
    """The bundle itself, or that of a run."""
    inside = join(absolute(uri), "bundle")
    is_run = not ANYWHERE.exists(join(absolute(uri), BUNDLE_FILE)) and ANYWHERE.exists(join(inside, BUNDLE_FILE))
    return inside if is_run else absolute(uri)


def check_members(members: Sequence[Member], method: CombineMethod, *, is_judged: bool = True) -> None:
    """Checks that bundles can be combined.

    Args:
        members: the bundles.
        method: how.
        is_judged: whether the result is measured on images with one label each.

    Raises:
        ConfigError: two are the same, or they differ in what they need to have in common; the message says which
            bundle, what was expected, and what came.
    """
    _check_distinct(members)
    first, *others = members
    for other in others:
        _check_alike(first, other)
    require(
        not is_judged or not first.info.multi_label,
        "combinations are judged by the accuracy, which a multi-label model has not: use method soup or ensemble, and "
        "leave out --data",
        method=method,
    )
    if method != "ensemble":
        _check_architectures(first, others)


def same_architecture(first: Bundle, other: Bundle) -> bool:
    """Whether the weights of two bundles can be averaged, as far as their model files say."""
    of_first, of_other = first.model_path, other.model_path
    return of_first.suffix == of_other.suffix and first_difference(layers_of(of_first), layers_of(of_other)) is None


def _check_distinct(members: Sequence[Member]) -> None:
    known = dict[str, str]()
    for member in members:
        check_has_classes(member.info)
        if member.info.model_id in known:
            raise ConfigError(
                "each model can be combined once: the same model is in "
                f"{shown(known[member.info.model_id])}. Received: {shown(member.uri)}"
            )
        known[member.info.model_id] = member.uri


def _check_architectures(first: Member, others: Sequence[Member]) -> None:
    expected = layers_of(first.bundle.model_path)
    for other in others:
        difference = first_difference(expected, layers_of(other.bundle.model_path))
        if difference is not None:
            raise ConfigError(
                f"a soup averages the weights of one architecture, that of {shown(first.uri)}: {difference}. An "
                f"ensemble takes different ones. Received: {shown(other.uri)}"
            )


def _check_alike(first: Member, other: Member) -> None:
    """Checks what all methods need."""
    ours, theirs = first.info, other.info
    _same("Keras and ONNX models cannot be in one", first, other, ours.model_file, theirs.model_file)
    _same("the classes and their order must be the same", first, other, ours.class_names, theirs.class_names)
    _same("multi-label models go with their like only", first, other, ours.multi_label, theirs.multi_label)
    rule = "each image is fitted once, for all models together, so they must take it alike"
    _same(rule, first, other, *_differing(ours.spec, theirs.spec))
    sizes = first.bundle.fixed_batch, other.bundle.fixed_batch
    _same("the models must take the same number of images per call", first, other, *sizes)


def _same(rule: str, first: Member, other: Member, expected: object, received: object) -> None:
    """Raises ConfigError unless two bundles have the same."""
    if expected != received:
        raise ConfigError(
            f"{rule}: expected {_short(expected)} as in {shown(first.uri)}. "
            f"Received: {_short(received)} in {shown(other.uri)}"
        )


def _differing(expected: ImageSpec, received: ImageSpec) -> tuple[dict[str, object], dict[str, object]]:
    """The fields in which two specs differ."""
    names = [field.name for field in fields(ImageSpec)]
    differing = [name for name in names if getattr(expected, name) != getattr(received, name)]
    return {name: getattr(expected, name) for name in differing}, {name: getattr(received, name) for name in differing}


def _short(value: object) -> str:
    """A value, or the first class names of many."""
    if isinstance(value, tuple):
        more = f" and {len(value) - MAX_NAMES} more" if len(value) > MAX_NAMES else ""
        return f"{', '.join(value[:MAX_NAMES])}{more}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={setting!r}" for name, setting in value.items())
    return str(value)
