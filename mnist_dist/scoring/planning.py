"""The forecast of `--plan`: how long a scoring job will take, extrapolated from a run on a sample.

Owns: the choice of the sample, and the arithmetic. Does not own: running the sample (`on_ray/scoring/plan.py`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.data.decoding import Times
from mnist_dist.data.sampling import RUN_ROWS, spread_rows

STREAM_ROWS = 256  # first rows of a compressed archive; later rows can only be read after all rows before them

Stage = Literal["decoding", "model", "reading"]


@dataclass(frozen=True, kw_only=True)
class Means:
    """The part of the cluster that a job uses."""

    actors: int
    units: float
    """GPUs per actor, or cores per actor if it has no GPU."""
    decode_cores: int
    """Cores that decode, in all actors or tasks together."""
    reading_threads: int
    """In all actors or tasks together."""


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Measurements of the job on a sample."""

    images: int
    ok: int
    images_per_s: float
    start_s: float
    """Time until the first image: start of Ray and the actors, loading of the model."""
    commit_s: float
    table_bytes: int
    times: Times
    """Time spent by stage, summed over all processes."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast for the whole job."""

    bottleneck: Stage
    decode_images_per_s_per_core: float
    model_images_per_s: float
    """Of all actors together."""
    balance: float
    """Number of cores that decode as fast as one GPU (without GPUs: one core) runs the model."""
    scoring_s: float
    commit_s: float
    seconds: float
    """From start to exit."""
    table_bytes: int


def busy_s(times: Times, means: Means) -> dict[Stage, float]:
    """How long each stage was busy, per actor, core or thread that works on it."""
    return {
        "model": times.model_s / means.actors,
        "decoding": times.decode_cpu_s / means.decode_cores,
        "reading": times.read_s / means.reading_threads,
    }


def forecast(run: SampleRun, means: Means, *, images: int) -> Forecast:
    """Extrapolates a sample with at least one usable image to `images` images."""
    busy = busy_s(run.times, means)
    decoding = run.images / max(run.times.decode_cpu_s, 1e-9)
    model = means.actors * run.ok / max(run.times.model_s, 1e-9)
    scoring_s, factor = images / run.images_per_s, images / run.images
    return Forecast(
        bottleneck=max(busy, key=lambda stage: busy[stage]),
        decode_images_per_s_per_core=decoding,
        model_images_per_s=model,
        balance=model / (means.actors * means.units) / decoding,
        scoring_s=scoring_s,
        commit_s=run.commit_s * factor,
        seconds=run.start_s + scoring_s + run.commit_s * factor,
        table_bytes=round(run.table_bytes * factor),
    )


def sample(table: pa.Table, *, images: int) -> pa.Table:
    """Rows spread evenly over a manifest; of compressed archives, only the first rows.

    Args:
        table: `image_table.COLUMNS`, at least one row.
        images: maximum number of rows, but not less than `RUN_ROWS`.
    """
    cheap = np.flatnonzero(_is_cheap(table))
    return table.take(pa.array(cheap[spread_rows(len(cheap), most=max(images, RUN_ROWS))]))


def _is_cheap(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows can be read without reading most of a compressed archive."""
    is_stream = pc.fill_null(pc.equal(table["packing"], "stream"), False).to_numpy()
    if not is_stream.any():
        return np.ones(len(table), np.bool_)
    archives = table["archive"].combine_chunks().dictionary_encode()
    codes = archives.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    place = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return np.asarray(~is_stream | (place < STREAM_ROWS))
