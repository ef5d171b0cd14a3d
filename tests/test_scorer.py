"""scorer: every image's answer in its place, full batches across shards, and nothing that hangs."""

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from corpus import DANGERS, H, W, colour_png, danger, every_format, manifest_rows, slow_pgm, tar_of

from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import Threads
from mnist_dist.engines.engine import Outputs
from mnist_dist.errors import ImageError, StorageError
from mnist_dist.images.decoder import Decoded, decode_image
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.score_config import InputConfig
from mnist_dist.scoring import scorer as module
from mnist_dist.scoring.predictions import Outcomes
from mnist_dist.scoring.scorer import Scorer
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.reading import TINY_AT_ONCE
from mnist_dist.store.anywhere import ANYWHERE

# b = images of a call, H = height px, W = width px, C = channels

SPEC = ImageSpec(height_px=5, width_px=7, channels=3)
LIMITS = DecodeConfig()
BATCH = 4
IMAGES = 60
END_S = 120
CODE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


class ColourEngine:
    """Says the mean colour as probabilities of red, green and blue, and the pixels as features.

    Args:
        batch_size: of a call.
        spec: of the pixels; None: no embeddings.
        calls_at_once: threads that should call it.
        meanwhile: is done in each call.
    """

    num_classes = 3

    def __init__(
        self,
        batch_size: int = BATCH,
        *,
        spec: ImageSpec | None = None,
        calls_at_once: int = 1,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.calls_at_once, self.under_way, self.max_under_way = calls_at_once, 0, 0
        self._lock = threading.Lock()
        self.batch_size, self.num_features, self.meanwhile = batch_size, spec.image_bytes if spec else 0, meanwhile
        self.sizes: list[int] = []
        self.failure: Exception | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self, pixels: Pixels) -> Outputs:
        with self._lock:
            self.sizes.append(len(pixels))
            self.under_way += 1
            self.max_under_way = max(self.max_under_way, self.under_way)
        try:
            return self._outputs(pixels)
        finally:
            with self._lock:
                self.under_way -= 1

    def _outputs(self, pixels: Pixels) -> Outputs:
        assert self.goes_on.wait(END_S)
        if self.failure is not None:
            raise self.failure
        self.meanwhile()
        colours = pixels.reshape(len(pixels), -1, pixels.shape[-1]).mean(axis=1, dtype=np.float32) / np.float32(255)
        features = pixels.reshape(len(pixels), -1).astype(np.float32) if self.num_features else None
        return Outputs(np.broadcast_to(colours, (len(pixels), self.num_classes)), features)


@contextlib.contextmanager
def scoring(
    engine: ColourEngine,
    *,
    spec: ImageSpec = SPEC,
    threads: int = 3,
    decoding: DecodeConfig = LIMITS,
) -> Iterator[Scorer]:
    with Scorer(engine, spec=spec, decoding=decoding, threads=Threads(decoding=threads, reading=1)) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Rows of `IMAGES` images, told apart by their colour."""
    path = tmp_path_factory.mktemp("images") / "x.tar"
    path.write_bytes(tar_of({f"{number:02d}.png": colour_png(*colour_of(number)) for number in range(IMAGES)}))
    return list_inputs(InputConfig(input=(str(path),))).table


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """As `archive`."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        (folder / f"{number:02d}.png").write_bytes(colour_png(*colour_of(number)))
    return list_inputs(InputConfig(input=(str(folder),))).table


@pytest.fixture
def broken(tmp_path: Path) -> str:
    (tmp_path / "broken.png").write_bytes(b"hello, world")
    return str(tmp_path / "broken.png")


def colour_of(number: int) -> tuple[int, int, int]:
    return number, 255 - number, number // 2


def colours(numbers: Sequence[int]) -> npt.NDArray[np.float32]:
    return np.array([colour_of(number) for number in numbers], np.float32) / np.float32(255)


def check_outcomes(outcomes: Outcomes, numbers: Sequence[int]) -> None:
    """Each image's own, in this order."""
    assert outcomes.status == ["ok"] * len(numbers)
    assert outcomes.error == [None] * len(numbers)
    np.testing.assert_allclose(outcomes.probabilities, colours(numbers), rtol=1e-6)
    assert set(outcomes.width.tolist()) == {W}
    assert set(outcomes.height.tolist()) == {H}
    assert outcomes.size_bytes == [len(colour_png(*colour_of(number))) for number in numbers]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def begun(pool: ThreadPoolExecutor, scorer: Scorer, *shards: pa.Table, **options: Any) -> list[Future[Outcomes]]:
    """The scores of shards that are all under way at the same time."""
    futures = [pool.submit(scorer.score, shard, **options) for shard in shards]
    wait_until(lambda: len(scorer._under_way) + sum(future.done() for future in futures) == len(shards))
    return futures


# --- every answer in its place ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("kind", ["archive", "files"])
def test_each_row_gets_its_own_outcome(request: pytest.FixtureRequest, kind: str, threads: int) -> None:
    rows = request.getfixturevalue(kind)
    with scoring(ColourEngine(), threads=threads) as scorer:
        outcomes = scorer.score(rows)
    check_outcomes(outcomes, range(IMAGES))
    assert outcomes.etag == rows["etag"].to_pylist()
    assert outcomes.embeddings is None


@pytest.mark.parametrize("threads", [1, 4])
def test_shards_at_the_same_time_get_their_own_outcomes(archive: pa.Table, files: pa.Table, threads: int) -> None:
    cuts = [0, 13, 14, 19, 41, 60]
    with scoring(ColourEngine(), threads=threads) as scorer, ThreadPoolExecutor(10) as pool:
        shards = [
            (range(start, end), pool.submit(scorer.score, rows.slice(start, end - start)))
            for start, end in itertools.pairwise(cuts)
            for rows in (archive, files)
        ]
        for numbers, future in shards:
            check_outcomes(future.result(END_S), numbers)


def test_an_isolated_shard_gets_the_same(files: pa.Table) -> None:
    with scoring(ColourEngine()) as scorer:
        check_outcomes(scorer.score(files, isolated=True), range(IMAGES))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_model_gets_the_pixels_of_training(tmp_path: Path, channels: int) -> None:
    spec = ImageSpec(height_px=6, width_px=9, channels=channels)
    images = every_format()
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    with scoring(ColourEngine(5, spec=spec), spec=spec) as scorer:
        outcomes = scorer.score(manifest_rows([str(tmp_path / name) for name in images]))
    assert outcomes.status == ["ok"] * len(images)
    assert outcomes.embeddings is not None
    given = dict(zip(images, outcomes.embeddings.reshape(-1, 6, 9, channels), strict=True))
    expected = {name: decode_image(data, spec).pixels for name, data in images.items()}
    assert [name for name in images if not np.array_equal(given[name], expected[name])] == []


def test_a_cropped_image_is_that_of_training(files: pa.Table) -> None:
    spec = ImageSpec(height_px=20, width_px=6, channels=1, resize="crop")
    with scoring(ColourEngine(7, spec=spec), spec=spec) as scorer:
        outcomes = scorer.score(files)
    assert outcomes.embeddings is not None
    images = [decode_image(ANYWHERE.read_bytes(uri), spec).pixels.ravel() for uri in files["uri"].to_pylist()]
    np.testing.assert_array_equal(outcomes.embeddings, images)


def test_images_decoded_elsewhere_are_classified_alike(files: pa.Table) -> None:
    size_bytes, etags = [123, None, 45], ["a", None, "c"]
    images: list[Decoded | ImageError] = [
        decode_image(colour_png(*colour_of(7)), SPEC),
        ImageError("missing", "no such file"),
        decode_image(colour_png(*colour_of(9)), SPEC),
    ]
    with scoring(ColourEngine(spec=SPEC)) as scorer:
        outcomes = scorer.classify(images, size_bytes=size_bytes, etags=etags)
        scored = scorer.score(files)
    assert (outcomes.status, outcomes.error) == (["ok", "missing", "ok"], [None, "no such file", None])
    assert (outcomes.size_bytes, outcomes.etag) == (size_bytes, etags)
    assert (outcomes.width.tolist(), outcomes.height.tolist()) == ([W, 0, W], [H, 0, H])
    np.testing.assert_array_equal(outcomes.probabilities[::2], scored.probabilities[7:10:2])
    assert outcomes.embeddings is not None
    assert scored.embeddings is not None
    np.testing.assert_array_equal(outcomes.embeddings[::2], scored.embeddings[7:10:2])


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "sizes"), [(1, [1]), (4, [4]), (22, [4, 4, 4, 4, 4, 2])])
def test_batches_are_full_but_the_last(archive: pa.Table, images: int, sizes: list[int]) -> None:
    engine = ColourEngine()
    with scoring(engine) as scorer:
        scorer.score(archive.slice(0, images))
    assert engine.sizes == sizes


def test_batches_are_filled_across_shards(archive: pa.Table) -> None:
    engine = ColourEngine()
    engine.goes_on.clear()
    with scoring(engine) as scorer, ThreadPoolExecutor(4) as pool:
        futures = begun(pool, scorer, archive.slice(0, 13), archive.slice(13, 5), archive.slice(18, 22))
        engine.goes_on.set()
        for numbers, future in zip([range(13), range(13, 18), range(18, 40)], futures, strict=True):
            check_outcomes(future.result(END_S), numbers)
    assert engine.sizes == [BATCH] * 10


@pytest.mark.parametrize("calls", [2, 3])
def test_as_many_calls_as_the_engine_takes_at_once_lose_nothing(archive: pa.Table, calls: int) -> None:
    engine = ColourEngine(calls_at_once=calls)
    engine.meanwhile = lambda: wait_until(lambda: engine.max_under_way == calls)
    with scoring(engine) as scorer, ThreadPoolExecutor(2) as pool:
        parts = [list(range(start, start + 10)) for start in range(0, IMAGES, 10)]
        for numbers, outcomes in zip(
            parts, pool.map(lambda some: scorer.score(archive.take(some)), parts), strict=True
        ):
            check_outcomes(outcomes, numbers)
    assert engine.max_under_way == calls
    assert sum(engine.sizes) == IMAGES


@pytest.mark.parametrize("calls", [2, 3])
@pytest.mark.parametrize("images", [1, 4, 6, 9])
def test_the_last_images_wait_for_no_other_call(archive: pa.Table, calls: int, images: int) -> None:
    engine = ColourEngine(calls_at_once=calls)
    with scoring(engine) as scorer:
        check_outcomes(scorer.score(archive.slice(0, images)), list(range(images)))
    assert sum(engine.sizes) == images


def test_a_failing_call_beside_others_is_raised_by_the_calls_that_wait_for_it(archive: pa.Table) -> None:
    engine = ColourEngine(calls_at_once=2)
    with scoring(engine) as scorer:
        engine.failure = ValueError("no memory")
        with pytest.raises(ValueError, match="no memory"):
            scorer.score(archive)
        engine.failure = None
        check_outcomes(scorer.score(archive.slice(0, 10)), list(range(10)))


def test_a_batch_waits_for_images_that_are_slow_to_come(tmp_path: Path) -> None:
    (tmp_path / "slow.pgm").write_bytes(slow_pgm(400))
    engine = ColourEngine()
    with scoring(engine, threads=1) as scorer:
        scorer.score(manifest_rows([str(tmp_path / "slow.pgm")] * 6))
    assert engine.sizes == [4, 2]


def test_the_last_images_of_a_shard_do_not_wait_for_another_call(archive: pa.Table) -> None:
    with scoring(ColourEngine(1000)) as scorer:
        for _ in range(3):
            scorer.score(archive)


def test_a_model_that_takes_less_than_it_said_gets_less(archive: pa.Table) -> None:
    engine = ColourEngine(8)
    with scoring(engine) as scorer:
        scorer.score(archive.slice(0, 16))
        engine.batch_size = 4  # as an engine whose memory does not hold a batch
        check_outcomes(scorer.score(archive.slice(20, 16)), range(20, 36))
    assert engine.sizes == [8, 8, 4, 4, 4, 4]


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    """Lets `gc.get_objects` skip what other tests have left in the process, which takes seconds to look through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("_only_new_objects")
def test_few_decoded_images_wait_for_a_slow_model(archive: pa.Table) -> None:
    engine, threads, alive = ColourEngine(), 2, list[int]()

    def count() -> None:
        if not alive:
            wait_until(scorer._images.is_full)
        alive.append(sum(type(thing) is module._Image for thing in gc.get_objects()))

    engine.meanwhile = count
    with scoring(engine, threads=threads) as scorer:
        scorer.score(pa.concat_tables([archive] * 10))
    waiting = (threads + 1) * TINY_AT_ONCE  # each thread has a few more in its hands
    assert BATCH < max(alive) <= 4 * BATCH + waiting


class Counted(Sequence[Decoded | ImageError]):
    """The same image over and over, and how often it was taken."""

    def __init__(self, images: int) -> None:
        self.images, self.taken = images, 0
        self._image = decode_image(colour_png(1, 2, 3), SPEC)

    def __len__(self) -> int:
        return self.images

    @overload
    def __getitem__(self, index: int) -> Decoded | ImageError: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Decoded | ImageError]: ...

    def __getitem__(self, index: int | slice) -> Decoded | ImageError | Sequence[Decoded | ImageError]:
        if isinstance(index, slice) or index >= self.images:
            raise IndexError(index)
        self.taken += 1
        return self._image


def test_images_decoded_elsewhere_wait_to_be_taken() -> None:
    engine, images = ColourEngine(), Counted(90)
    engine.goes_on.clear()
    with scoring(engine) as scorer, ThreadPoolExecutor(1) as pool:
        future = pool.submit(scorer.classify, images, size_bytes=[1] * 90, etags=["e"] * 90)
        wait_until(lambda: scorer._images.is_full() and engine.under_way == 1)
        assert images.taken <= 4 * BATCH
        engine.goes_on.set()
        assert future.result(END_S).status == ["ok"] * 90


# --- images that cannot be used --------------------------------------------------------------------------------------


def test_a_broken_image_is_a_status(files: pa.Table, broken: str) -> None:
    rows = pa.concat_tables([files.slice(0, 9), manifest_rows([broken, "/nowhere.png"]), files.slice(9, 6)])
    with scoring(ColourEngine(spec=SPEC)) as scorer:
        outcomes = scorer.score(rows)
    assert outcomes.status == [*["ok"] * 9, "unsupported", "missing", *["ok"] * 6]
    assert outcomes.error[10] == "no such file"
    assert outcomes.error[9] is not None
    assert outcomes.error[9].startswith("not one of JPEG, PNG")
    assert (outcomes.size_bytes[9], outcomes.size_bytes[10]) == (12, None)
    assert outcomes.width[8:12].tolist() == [W, 0, 0, W]
    kept = [*range(9), *range(11, 17)]
    np.testing.assert_allclose(outcomes.probabilities[kept], colours(range(15)), rtol=1e-6)


@pytest.mark.parametrize("spec", [SPEC, None])
def test_a_shard_may_hold_no_image_at_all(broken: str, spec: ImageSpec | None) -> None:
    engine = ColourEngine(spec=spec)
    with scoring(engine) as scorer:
        outcomes = scorer.score(manifest_rows([broken] * 6))
    assert outcomes.status == ["unsupported"] * 6
    assert outcomes.probabilities.shape == (6, 3)
    assert (outcomes.embeddings is None) == (spec is None)
    assert outcomes.embeddings is None or outcomes.embeddings.shape == (6, SPEC.image_bytes)
    assert engine.sizes == []


@pytest.mark.slow
def test_ten_thousand_broken_images_in_a_row_are_nothing(files: pa.Table, broken: str) -> None:
    rows = pa.concat_tables([manifest_rows([broken] * 10_000), files.slice(0, 5)])
    with scoring(ColourEngine()) as scorer:
        outcomes = scorer.score(rows)
    assert outcomes.status == [*["unsupported"] * 10_000, *["ok"] * 5]
    np.testing.assert_allclose(outcomes.probabilities[10_000:], colours(range(5)), rtol=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_shard_whose_storage_fails_does_not_disturb_another(files: pa.Table) -> None:
    engine = ColourEngine()
    engine.goes_on.clear()
    failing = pa.concat_tables([files.slice(40, 6), manifest_rows(["ftp://bucket/x.png"]), files.slice(46, 6)])
    with scoring(engine) as scorer, ThreadPoolExecutor(2) as pool:
        good, bad = begun(pool, scorer, files.slice(0, 31), failing)
        engine.goes_on.set()
        with pytest.raises(StorageError, match=r"Received: 'ftp://bucket/x\.png'"):
            bad.result(END_S)
        check_outcomes(good.result(END_S), range(31))
        check_outcomes(scorer.score(files.slice(2, 7)), range(2, 9))


def test_what_the_model_raises_every_call_raises_that_waits_for_it(archive: pa.Table) -> None:
    engine = ColourEngine()
    engine.goes_on.clear()
    engine.failure = RuntimeError("the model is ill")
    with scoring(engine) as scorer, ThreadPoolExecutor(3) as pool:
        futures = begun(pool, scorer, archive.slice(0, 2), archive.slice(2, 3), archive.slice(5, 6))
        engine.goes_on.set()
        for future in futures:
            with pytest.raises(RuntimeError, match="the model is ill"):
                future.result(END_S)
        engine.failure = None
        check_outcomes(scorer.score(archive), range(IMAGES))


HANGS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import corpus, test_scorer
from mnist_dist.config import DecodeConfig
from mnist_dist.errors import DecoderStuck

good, *hanging = sys.argv[1:]
pool = ThreadPoolExecutor(2)
try:
    with test_scorer.scoring(test_scorer.ColourEngine(), decoding=DecodeConfig(image_timeout_s=0.2)) as scorer:
        assert scorer.score(corpus.manifest_rows([good])).status == ["ok"]
        calls = [pool.submit(scorer.score, corpus.manifest_rows([good, path])) for path in hanging]
        errors = [call.exception() for call in calls]
        print(*errors, sep="\\n")
        raise errors[0]
except DecoderStuck:
    print("left", flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_decoder_that_hangs_is_raised_by_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(DANGERS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *CODE]))
    for name in ("good", "hang"):
        (tmp_path / f"{name}.jpg").write_bytes(danger(name))
    command = [sys.executable, "-c", HANGS, *(f"{tmp_path}/{name}.jpg" for name in ("good", "hang", "hang"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    stuck = "decoding an image takes longer than 0.2 s"
    assert (ran.returncode, ran.stdout.splitlines()) == (0, [stuck, stuck, "left"]), ran.stderr


# --- what is told ----------------------------------------------------------------------------------------------------


def test_progress_counts_every_image_once(files: pa.Table, broken: str) -> None:
    counts = {"ok": 0, "other": 0}
    lock = threading.Lock()

    def progress(ok: int, other: int) -> None:
        with lock:
            counts["ok"] += ok
            counts["other"] += other

    rows = pa.concat_tables([files, manifest_rows([broken] * 7)])
    with scoring(ColourEngine()) as scorer:
        scorer.score(rows, progress=progress)
        assert counts == {"ok": IMAGES, "other": 7}
        scorer.classify([ImageError("failed", "x")], size_bytes=[None], etags=[None], progress=progress)
    assert counts == {"ok": IMAGES, "other": 8}


@pytest.mark.slow
def test_times_add_up(archive: pa.Table) -> None:
    engine = ColourEngine(meanwhile=lambda: time.sleep(0.01))
    began = time.perf_counter()
    with scoring(engine, threads=2) as scorer:
        scorer.score(archive.slice(0, 10))
        first = (scorer.times.read_s, scorer.times.decode_s, scorer.times.model_s)
        scorer.score(archive.slice(10, 10))
        second = (scorer.times.read_s, scorer.times.decode_s, scorer.times.model_s)
    wall_s = time.perf_counter() - began
    assert 0.03 <= first[2] < second[2] <= wall_s
    assert second[2] >= 0.06
    assert all(0 < before < after <= 3 * wall_s for before, after in zip(first[:2], second[:2], strict=True))


# --- the end ---------------------------------------------------------------------------------------------------------


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("model", "decode"))]


def test_what_is_idle_leaves_no_threads_when_it_is_closed(archive: pa.Table) -> None:
    with scoring(ColourEngine()):
        pass
    with scoring(ColourEngine()) as scorer:
        scorer.score(archive)
    assert names_of_threads() == []


def test_an_error_on_the_way_leaves_no_threads(archive: pa.Table) -> None:
    engine = ColourEngine()
    rows = pa.concat_tables([manifest_rows(["ftp://bucket/x.png"]), archive])
    with pytest.raises(StorageError, match="Received: 'ftp:"), scoring(engine) as scorer:
        scorer.score(rows)
    assert names_of_threads() == []
