"""How fast one process decodes, predicts, and does both at once, on a sample of a job's images.

Owns: the measurements, made with the job's own parts and bounded by seconds. Does not own: which images (`sample`
chooses, of a list), what follows from the figures (`planning`), or where it runs (`on_ray/scoring/plan.py`).
"""

# n = rows of the sample

import itertools
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.config import DecodeConfig
from mnist_dist.data.images import Decoded, ImageSpec
from mnist_dist.data.sampling import RUN_ROWS, spread_rows
from mnist_dist.engines.engine import Engine, calls_per_s
from mnist_dist.errors import ConfigError, ImageError
from mnist_dist.scoring.decoding import Collector, DecodePool, Threads, Times
from mnist_dist.scoring.planning import Pace
from mnist_dist.scoring.predictions import Outcomes
from mnist_dist.scoring.scorer import SHARDS_AT_ONCE, Scorer

SAMPLE_IMAGES = 512
SAMPLE_BYTES = 128 * 2**20  # of decoded pixels
STREAM_ROWS = 64  # of a compressed archive, from its begin: later ones would have all before them read
DECODE_S = 3.0
MODEL_S = 2.0
PIPELINE_S = 8.0
SETTLING_S = 1.0  # of the pipeline, that do not count: its queues fill
MOST_SHARD, LEAST_BATCHES = 256, 2  # images of a shard of the pipeline; batches of it


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured."""

    rows: pa.Table
    """Of the manifest: the sample."""
    spec: ImageSpec
    decoding: DecodeConfig
    threads: Threads
    decode_elsewhere: bool
    """The pipeline is given decoded images, as where tasks decode."""


def sample(table: pa.Table, *, image_bytes: int) -> pa.Table:
    """A few hundred rows of a manifest, spread over all of it.

    Args:
        table: `manifest.COLUMNS`, at least one row.
        image_bytes: of a decoded image.
    """
    cheap = np.flatnonzero(_is_cheap(table))
    most = max(RUN_ROWS, min(SAMPLE_IMAGES, SAMPLE_BYTES // image_bytes))
    return table.take(pa.array(cheap[spread_rows(len(cheap), most=most)]))


def _is_cheap(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Rows that are read without most of a compressed archive."""
    is_stream = pc.fill_null(pc.equal(table["packing"], "stream"), False).to_numpy()
    if not is_stream.any():
        return np.ones(len(table), np.bool_)
    archives = table["archive"].combine_chunks().dictionary_encode()
    codes = archives.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    place = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return np.asarray(~is_stream | (place < STREAM_ROWS))


def measure(
    open_engine: Callable[[], Engine],
    probe: Probe,
    *,
    write: Callable[[pa.Table, Outcomes], int],
) -> Pace:
    """Measures everything, one after the other.

    Args:
        open_engine: loads the model and calls it once.
        probe: what is measured.
        write: makes the rows of a shard and gives their size in bytes on disk.

    Raises:
        ConfigError: not one image of the sample can be used.
        ServiceError, StorageError: not an image but the storage failed.
        DecoderStuck: an image takes longer than it may.
    """
    engine = open_engine()
    began = time.perf_counter()
    decoded = _Decoded(probe)
    model = _model_images_per_s(engine, decoded.batch(engine.batch_size))
    shard = decoded.shard(_shard_images(model, decoded, batch_size=engine.batch_size, cores=probe.threads.decoding))
    pipeline = _Pipeline(engine, probe, shard, write=write)
    return Pace(
        images=decoded.first_images,
        not_ok=decoded.first_images - len(decoded.pixels),
        read_s=decoded.first.read_s / decoded.first_images,
        decode_s=max(decoded.times.decode_s, 1e-9) / decoded.images,
        model_images_per_s=model,
        pipeline_images_per_s=pipeline.images_per_s(),
        row_s=pipeline.row_s,
        row_bytes=pipeline.row_bytes,
        measured_s=time.perf_counter() - began,
        memory_bytes=peak_memory_bytes(),
    )


def peak_memory_bytes() -> int:
    """Most that this process held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _shard_images(model: float, decoded: "_Decoded", *, batch_size: int, cores: int) -> int:
    """Images of a shard of the pipeline: several of them pass in the time that it is measured."""
    decode_s = decoded.times.decode_s / decoded.images / cores
    wanted = PIPELINE_S / 4 / (1 / model + decode_s)
    return int(max(LEAST_BATCHES * batch_size, min(wanted, MOST_SHARD)))


class _Decoded:
    """A sample that was read and decoded, as much of it as `DECODE_S` allows, in an order that is fair at any end.

    Attributes:
        rows: what was decoded.
        first: times of the first pass, when nothing had been read before.
        times: of all passes together, over `images` images.
    """

    def __init__(self, probe: Probe) -> None:
        self.images, self.first_images = 0, 0
        pieces = [probe.rows.slice(start, RUN_ROWS) for start in range(0, len(probe.rows), RUN_ROWS)]
        # compressed archives are read in their order, and each member once
        self._is_stream = pc.any(pc.equal(probe.rows["packing"], "stream")).as_py()
        order = np.arange(len(pieces)) if self._is_stream else np.random.default_rng(0).permutation(len(pieces))
        found: list[Collector] = []
        read: list[pa.Table] = []
        began = time.perf_counter()
        with DecodePool(probe.spec, config=probe.decoding, threads=probe.threads) as pool:
            several = max(1, 2 * probe.threads.decoding // RUN_ROWS)  # pieces at once that leave no core idle
            for start in range(0, len(pieces), several):
                if start and time.perf_counter() - began > DECODE_S:
                    break
                rows = pa.concat_tables([pieces[number] for number in order[start : start + several]])
                found.append(_decode(rows, pool))
                self.first_images += len(rows)
                read.append(rows)
            self.rows = pa.concat_tables(read)
            self.first = Times(**vars(pool.times))
            self.images = self.first_images
            while time.perf_counter() - began < DECODE_S / 2:  # of tiny images the first pass tells little
                _decode(self.rows, pool)
                self.images += len(self.rows)
            self.times = pool.times
        self.all: list[Decoded | ImageError] = [image for each in found for image in each.images]
        self.pixels = [image.pixels for image in self.all if isinstance(image, Decoded)]
        self._sizes = [size for each in found for size in each.size_bytes]
        self._etags = [etag for each in found for etag in each.etags]
        if not self.pixels:
            problem = next(image for image in self.all if isinstance(image, ImageError))
            raise ConfigError(f"none of {len(self.all)} sampled images can be used, such as: {problem}")

    def batch(self, size: int) -> npt.NDArray[np.uint8]:
        """`uint8 [size, H, W, C]`."""
        return np.stack(list(itertools.islice(itertools.cycle(self.pixels), size)))

    def shard(self, size: int) -> "_Shard":
        """So many images, the sample's again and again; fewer of compressed archives."""
        places = np.arange(min(size, len(self.all)) if self._is_stream else size) % len(self.all)
        return _Shard(
            self.rows.take(pa.array(places)),
            [self.all[place] for place in places],
            [self._sizes[place] for place in places],
            [self._etags[place] for place in places],
        )


@dataclass(frozen=True)
class _Shard:
    """Rows of a manifest, and what they were decoded to."""

    rows: pa.Table
    images: list[Decoded | ImageError]
    size_bytes: list[int | None]
    etags: list[str | None]


def _decode(rows: pa.Table, pool: DecodePool) -> Collector:
    found = Collector(len(rows))
    pool.begin(rows, found, isolated=False)
    found.wait(pool)
    return found


def _model_images_per_s(engine: Engine, batch: npt.NDArray[np.uint8]) -> float:
    return len(batch) * calls_per_s(lambda: engine(batch), seconds=MODEL_S, at_once=engine.calls_at_once)


class _Pipeline:
    """The job's pipeline on one shard again and again, two at once.

    Attributes:
        row_s, row_bytes: of a row of the table, once `images_per_s` has run.
    """

    def __init__(
        self, engine: Engine, probe: Probe, shard: _Shard, *, write: Callable[[pa.Table, Outcomes], int]
    ) -> None:
        self._engine, self._probe, self._shard, self._write = engine, probe, shard, write
        self._done: list[tuple[float, int]] = []
        self._failures: list[BaseException] = []
        self.row_s = self.row_bytes = 0.0

    def images_per_s(self) -> float:
        """Speed once it has settled."""
        probe, deadline = self._probe, time.perf_counter() + SETTLING_S + PIPELINE_S
        with Scorer(self._engine, spec=probe.spec, decoding=probe.decoding, threads=probe.threads) as scorer:
            threads = [
                threading.Thread(target=self._score_until, args=(deadline, scorer), daemon=True)
                for _ in range(SHARDS_AT_ONCE)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self._failures:
                raise self._failures[0]
        return settled_images_per_s(self._done, until=deadline)

    def _score_until(self, deadline: float, scorer: Scorer) -> None:
        try:
            while time.perf_counter() < deadline and not self._failures:
                outcomes = self._outcomes(scorer)
                began = time.perf_counter()
                size = self._write(self._shard.rows, outcomes)
                self.row_s = (time.perf_counter() - began) / len(self._shard.rows)
                self.row_bytes = size / len(self._shard.rows)
        except BaseException as failure:  # raised by `images_per_s`, whose threads these are
            self._failures.append(failure)

    def _outcomes(self, scorer: Scorer) -> Outcomes:
        shard = self._shard
        if self._probe.decode_elsewhere:
            return scorer.classify(shard.images, size_bytes=shard.size_bytes, etags=shard.etags, progress=self._note)
        return scorer.score(shard.rows, progress=self._note)

    def _note(self, ok: int, other: int) -> None:
        self._done.append((time.perf_counter(), ok + other))


def settled_images_per_s(done: list[tuple[float, int]], *, until: float) -> float:
    """Speed from the first second after the first images on, up to a time; less where that leaves too little.

    Args:
        done: when so many more images were done, s; at least 2.
        until: the time, s, after which the work ran out.
    """
    times = sorted(done)
    settled = [item for item in times if times[0][0] + SETTLING_S <= item[0] <= until]
    counted = settled if len(settled) > LEAST_BATCHES else times
    images = sum(count for _, count in itertools.islice(counted, 1, None))
    return images / max(counted[-1][0] - counted[0][0], 1e-9)
