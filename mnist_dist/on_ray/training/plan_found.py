"""What the plan of a training found: how long each part takes, what is slowest, and how a person is told."""

from dataclasses import dataclass
from typing import Any

from rich import filesize

from mnist_dist.console import Console, duration
from mnist_dist.on_ray.cluster import Resources, Share
from mnist_dist.training.planning import PhaseForecast, overall_images_per_s


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured, and what follows."""

    images: int
    share: Share
    have: Resources
    decode_s: float | None
    """Of a core for one image; None: nothing is decoded."""
    features_images_per_s: float | None
    """Of all actors; None: no features are computed ahead."""
    features_images: int
    phases: list[PhaseForecast]
    start_s: float
    """Listing, Ray, and the processes up to their first step."""
    test_s: float
    memory_bytes: int

    @property
    def parts(self) -> dict[str, float]:
        """How long each takes, s."""
        decoding = 0.0 if self.decode_s is None else self.images * self.decode_s / max(1.0, self.have.cpus)
        features = self.features_images / self.features_images_per_s if self.features_images_per_s else 0.0
        return {"decoding": decoding, "features": features, "training": sum(found.seconds for found in self.phases)}

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def seconds(self) -> float:
        """From start to exit."""
        return self.start_s + sum(self.parts.values()) + self.test_s

    @property
    def balance(self) -> float:
        """Cores with which decoding would take as long as features and training."""
        rest_s = self.parts["features"] + self.parts["training"]
        return 0.0 if self.decode_s is None else self.images * self.decode_s / rest_s


def result_of(found: Found) -> dict[str, Any]:
    """The keys of the JSON line; see `plan_train`."""
    rate = found.features_images_per_s
    return {
        "plan": True,
        "images": found.images,
        "bottleneck": found.bottleneck,
        "decode_images_per_s_per_core": None if found.decode_s is None else round(1 / found.decode_s, 2),
        "features_images_per_s": None if rate is None else round(rate, 2),
        "images_per_s": round(overall_images_per_s(found.phases), 2),
        "phases": [
            {name: round(v, 2) if isinstance(v, float) else v for name, v in vars(phase).items()}
            for phase in found.phases
        ],
        "cpus_per_gpu": round(found.balance / found.share.workers, 2) if found.share.gpu else None,
        "expected_seconds": round(found.seconds, 1),
        "worker_memory_bytes": found.memory_bytes,
        "workers": found.share.workers,
    }


def say(found: Found, *, console: Console) -> None:
    """Tells a person."""
    parts = found.parts
    if found.decode_s is not None:
        console.line(
            f"decoding: {found.decode_s * 1e3:,.2f} ms of a core for an image, {duration(parts['decoding'])} for "
            f"{found.images:,} images, once"
        )
    if found.features_images_per_s is not None:
        console.line(
            f"features: {found.features_images_per_s:,.1f} images/s, {duration(parts['features'])} for "
            f"{found.features_images:,} images, once"
        )
    for phase in found.phases:
        console.line(
            f"{phase.name}: {phase.images_per_s:,.1f} images/s, {phase.steps:,} steps and {duration(phase.epoch_s)} an "
            f"epoch, {duration(phase.seconds)} for {phase.epochs} epochs"
        )
    unit = " a GPU" if found.share.gpu else ""
    cores = found.balance / (found.share.workers if found.share.gpu else 1)
    also = f"; with {cores:,.2g} core(s){unit} decoding takes as long as the rest" if found.decode_s is not None else ""
    console.line(f"bottleneck: {found.bottleneck}{also}")
    console.line(
        f"expected: {duration(found.seconds)} from start to end; memory: "
        f"{filesize.decimal(found.memory_bytes)} a worker"
    )
    console.line("plan: nothing was kept")
