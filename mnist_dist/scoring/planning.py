"""What a scoring job will take, from what one of its actors was measured to do: pure arithmetic.

Owns: the bottleneck, the balance between decoding and the model, the expected speed and duration. Does not own: the
measurements (`measuring`), or where they are made (`on_ray/scoring/plan.py`).
"""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["decoding", "model", "reading"]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What one actor was measured to do, alone on its cores."""

    images: int
    """That were sampled and decoded."""
    not_ok: int
    """Of those, the ones that cannot be used."""
    read_s: float
    """Of a reading thread for one image, the first time that it is read."""
    decode_s: float
    """Of a core for one image."""
    model_images_per_s: float
    """On ready batches, with nothing beside it."""
    pipeline_images_per_s: float
    """All of the actor's work at once: the model, what makes rows of its answers, and in the actor's threads reading
    and decoding, where they are its part."""
    row_s: float
    """To make a row of the table and write it."""
    row_bytes: float
    """Of a row on disk."""
    measured_s: float
    """That the measurement took, once the model was open."""
    memory_bytes: int
    """Most that the process held."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What the job takes of the cluster."""

    actors: int
    cores_of_actor: float
    gpus_of_actor: float
    decode_cores: float
    """That decode, over all actors or tasks."""
    reading_threads: int
    """Over all actors or tasks."""
    decode_in_tasks: bool
    """Decoding has cores of its own; else it shares the actors'."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a job will do."""

    images_per_s: float
    bottleneck: Stage
    decode_images_per_s: float
    """Of all cores that decode, had they nothing else to do."""
    model_images_per_s: float
    """Of all actors, had their cores nothing else to do."""
    balance: float
    """Cores that decode as fast as one GPU takes images, or else as one core of the model does."""
    scoring_s: float
    commit_s: float
    seconds: float
    """From start to exit."""
    table_bytes: int


def forecast(pace: Pace, means: Means, *, images: int, start_s: float) -> Forecast:
    """What a job will do.

    Args:
        pace: of one actor.
        means: how many there are, and what decodes for them.
        images: to be scored.
        start_s: listing, Ray, and the actors up to the first image.
    """
    decoding = means.decode_cores / pace.decode_s
    model = means.actors * pace.model_images_per_s
    reading = means.reading_threads / pace.read_s
    of_actors = means.actors * pace.pipeline_images_per_s
    rate = min(of_actors, reading, *([decoding] if means.decode_in_tasks else []))
    scoring_s = images / rate
    commit_s = images * pace.row_s  # rows are read and written once more, by the driver
    units = means.gpus_of_actor or means.cores_of_actor
    return Forecast(
        images_per_s=rate,
        bottleneck="reading" if reading <= rate else "decoding" if decoding < model else "model",
        decode_images_per_s=decoding,
        model_images_per_s=model,
        balance=pace.model_images_per_s / units * pace.decode_s,
        scoring_s=scoring_s,
        commit_s=commit_s,
        seconds=start_s + scoring_s + commit_s,
        table_bytes=round(images * pace.row_bytes),
    )
