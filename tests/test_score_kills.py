"""The scoring command under real kills: whatever dies and whenever, there is exactly one row for each image."""

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from harness import Command, title, write_spread_bundle
from PIL import Image

from mnist_dist import load_bundle
from mnist_dist.scoring.predictions import read_predictions

CRASHING = Path(__file__).parent / "crashing"
GOOD, SHARD = 396, 20
BROKEN = {"empty.png": "empty", "cut.png": "truncated", "text.png": "unsupported", "gone.png": "missing"}
WIDTH, HEIGHT = 1400, 1200  # decoding 400 of these takes long enough to be killed in the middle, on any machine
CHAOS_SEEDS = range(100, 116)
KILLS_IN_CHAOS = 2  # of each seed


def squares(seed: int, *, width: int, height: int) -> Image.Image:
    """A few squares of random colours, which no resizing averages out."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [squares(number, width=14, height=12) for number in range(100)]
    return write_spread_bundle(tmp_path_factory.mktemp("bundle") / "bundle", images=images, seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """396 images that are slow to decode, and four broken ones."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(GOOD):
        squares(number, width=WIDTH, height=HEIGHT).save(folder / f"{number:03d}.png", compress_level=1)
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:-2000])
    (folder / "text.png").write_text("no image at all, whatever its name says")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    return folder


Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed_table(tmp_path_factory: pytest.TempPathFactory, bundle: Path, images: Path) -> Path:
    """The output of a run that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "table"
    with Job(bundle, images, output) as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["ok"], result["errors"], result["skipped"]) == (GOOD, 4, 0)
    return output


@pytest.fixture(scope="module")
def undisturbed(undisturbed_table: Path, bundle: Path) -> Rows:
    """The rows of a run that nobody disturbs."""
    rows = rows_of(undisturbed_table)
    assert {Path(uri).name: row["status"] for uri, row in rows.items() if row["status"] != "ok"} == BROKEN
    assert len({row["predicted_class"] for row in rows.values()}) > 2
    opened = load_bundle(bundle)
    for uri in sorted(rows)[:3]:
        assert rows[uri]["probabilities"] == pytest.approx(opened.predict(uri).probabilities.tolist(), abs=1e-5)
    return rows


class Job(Command):
    """`python -m jobs.score`."""

    def __init__(self, bundle: Path, images: Path, output: Path, *flags: str, **environment: str) -> None:
        self._work = output / "_work"
        command = ["jobs.score", "--bundle", str(bundle), "--input", str(images), "--output", str(output)]
        command += ["--shard-size", str(SHARD), "--actors", "1", "--cpus-per-actor", "1"]
        super().__init__(*command, *flags, **environment)

    def __enter__(self) -> "Job":
        return self

    def workers(self, kind: str) -> list[psutil.Process]:
        """Processes of the job's Ray that are something, or at work on something."""
        return [process for process in self.descendants() if kind in title(process)]

    def shards_done(self) -> int:
        return sum(1 for _ in self._work.glob("g*/shard-*.parquet"))

    def is_building_the_table(self) -> bool:
        return any(self._work.glob("g*/out-*"))

    def is_publishing_the_table(self) -> bool:
        return any(self._work.glob("g*/commit.json"))


def rows_of(output: Path) -> Rows:
    """The rows by uri; there are no two of one."""
    rows = read_predictions(output).to_pylist()
    by_uri = {row["uri"]: row for row in rows}
    assert len(by_uri) == len(rows)
    return by_uri


def assert_same_rows(rows: Rows, expected: Rows) -> None:
    assert set(rows) == set(expected)
    for uri, row in rows.items():
        theirs = expected[uri]
        for name in set(row) - {"probabilities", "confidence", "scored_at"}:
            assert row[name] == theirs[name], (uri, name)
        if row["status"] == "ok":
            assert row["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)


def assert_goes_on_to_the_end(bundle: Path, images: Path, output: Path, expected: Rows, *flags: str) -> dict[str, Any]:
    """The same command again ends with exit 0 and the right rows, and leaves nothing behind."""
    with Job(bundle, images, output, *flags) as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert result["images"] == len(expected)
    assert_same_rows(rows_of(output), expected)
    assert sorted(path.name for path in output.iterdir()) == [
        *("_SUCCESS", "_summary.json", "_tables", "_work", "table"),
    ]
    assert [path.name for path in output.glob("_work/*")] == ["lock"]
    assert len(list(output.glob("_tables/*"))) == 1
    return result


# --- the driver ------------------------------------------------------------------------------------------------------


def kill_at(moment: str, job: Job, choose: random.Random) -> None:
    """Kills the driver at a random time of a phase: beginning, scoring or committing."""
    if moment == "beginning":  # imports, listing, the manifest, Ray
        time.sleep(choose.uniform(0.5, 9.0))
        job.descendants()
    elif moment == "scoring":
        wanted = choose.randint(1, 17)
        job.until(lambda: job.shards_done() >= wanted)
        job.descendants()
        time.sleep(choose.uniform(0, 0.3))
    else:
        job.until(lambda: job.shards_done() >= 1)
        job.descendants()
        begun, max_s = choose.choice([(job.is_building_the_table, 0.05), (job.is_publishing_the_table, 0.01)])
        job.until(begun, poll_s=0.0005)
        time.sleep(choose.uniform(0, max_s))
    job.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "moments"),
    [
        (0, ("beginning", "scoring")),
        pytest.param(1, ("scoring", "committing"), marks=pytest.mark.chaos),
        pytest.param(2, ("scoring", "beginning"), marks=pytest.mark.chaos),
    ],
)
def test_a_driver_killed_at_any_moment_is_continued_by_the_same_command(
    tmp_path: Path, bundle: Path, images: Path, undisturbed: Rows, seed: int, moments: tuple[str, ...]
) -> None:
    choose = random.Random(seed)
    for moment in moments:
        with Job(bundle, images, tmp_path / "table") as job:
            kill_at(moment, job, choose)
    assert_goes_on_to_the_end(bundle, images, tmp_path / "table", undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", CHAOS_SEEDS)
def test_drivers_are_killed_again_and_again(
    tmp_path: Path, bundle: Path, images: Path, undisturbed: Rows, seed: int
) -> None:
    choose = random.Random(seed)
    flags = ["--decode", choose.choice(["actor", "tasks"])]
    for _ in range(KILLS_IN_CHAOS):
        with Job(bundle, images, tmp_path / "table", *flags) as job:
            kill_at(choose.choice(["beginning", "scoring", "scoring", "committing"]), job, choose)
    assert_goes_on_to_the_end(bundle, images, tmp_path / "table", undisturbed, *flags)


@pytest.fixture(scope="module")
def all_scored(tmp_path_factory: pytest.TempPathFactory, bundle: Path, images: Path) -> Path:
    """An output whose shards are all done, and of whose table nothing is made."""
    output = tmp_path_factory.mktemp("all_scored") / "table"
    in_the_way = output / "table" / "part-000001-00000.parquet"
    in_the_way.mkdir(parents=True)
    with Job(bundle, images, output) as job:
        assert job.ended()[1]["error_type"] == "IsADirectoryError"
    in_the_way.rmdir()
    (output / "_work" / "g000001" / "commit.json").unlink()
    shutil.rmtree(output / "_work" / "g000001" / "out-000001")
    assert job.shards_done() == 20
    return output


def assert_commits_after_a_kill(
    output: Path, all_scored: Path, bundle: Path, images: Path, expected: Rows, choose: random.Random
) -> None:
    shutil.copytree(all_scored, output)
    with Job(bundle, images, output) as job:
        kill_at("committing", job, choose)
    assert_goes_on_to_the_end(bundle, images, output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(8, marks=pytest.mark.chaos)])
def test_a_driver_killed_in_the_commit_is_continued_by_the_same_command(
    tmp_path: Path, all_scored: Path, bundle: Path, images: Path, undisturbed: Rows, kills: int
) -> None:
    choose = random.Random(3)
    for number in range(kills):
        assert_commits_after_a_kill(tmp_path / f"{number}", all_scored, bundle, images, undisturbed, choose)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", CHAOS_SEEDS)
def test_drivers_are_killed_in_the_commit(
    tmp_path: Path, all_scored: Path, bundle: Path, images: Path, undisturbed: Rows, seed: int
) -> None:
    choose = random.Random(seed)
    for number in range(4):
        assert_commits_after_a_kill(tmp_path / f"{number}", all_scored, bundle, images, undisturbed, choose)


@pytest.mark.chaos
@pytest.mark.parametrize("moment", ["scoring", "committing"])
def test_an_old_table_survives_the_kill_of_a_fresh_run(
    tmp_path: Path, bundle: Path, images: Path, undisturbed_table: Path, undisturbed: Rows, moment: str
) -> None:
    shutil.copytree(undisturbed_table, tmp_path / "table")
    with Job(bundle, images, tmp_path / "table", "--mode", "fresh") as job:
        kill_at(moment, job, random.Random(5))
    assert_same_rows(rows_of(tmp_path / "table"), undisturbed)  # old or new
    assert_goes_on_to_the_end(bundle, images, tmp_path / "table", undisturbed, "--mode", "fresh")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)])
def test_a_signal_keeps_what_is_done_and_prints_the_command_that_goes_on(
    tmp_path: Path, bundle: Path, images: Path, undisturbed: Rows, number: signal.Signals
) -> None:
    with Job(bundle, images, tmp_path / "table") as job:
        assert job.until(lambda: job.shards_done() >= 3)
        job.process.send_signal(signal.SIGSTOP)  # so that it is not through before the second one has begun
        with Job(bundle, images, tmp_path / "table", "--lock-wait-s", "0") as second:
            code, result, _ = second.ended()
        assert code == 2
        assert "another driver is working on" in result["error"]
        job.process.send_signal(number)
        job.process.send_signal(signal.SIGCONT)
        code, result, err = job.ended()
        done = job.shards_done()
    assert code == 128 + number
    assert result["job"] == "score"
    assert "-m jobs.score --bundle" in result["error"]
    assert f"error: {result['error']}" in err
    assert "saving progress" in err
    assert 3 <= done < 20
    result = assert_goes_on_to_the_end(bundle, images, tmp_path / "table", undisturbed)
    assert result["skipped"] == done * SHARD


@pytest.mark.slow
def test_a_signal_while_the_actors_start_ends_the_job_without_another_ray(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    with Job(bundle, images, tmp_path / "table") as job:
        assert job.until(lambda: job.workers("ShardActor"))  # it loads the model now
        rays = {process.pid for process in job.workers("gcs_server")}
        job.process.send_signal(signal.SIGTERM)
        while job.process.poll() is None:
            rays |= {process.pid for process in job.workers("gcs_server")}
            time.sleep(0.05)
        code, result, _ = job.ended()
    assert code == 143
    assert result["error_type"] == "Interrupted"
    assert len(rays) == 1


# --- the workers -----------------------------------------------------------------------------------------------------


def kill_workers(job: Job, kind: str, *, shards_done: int) -> None:
    """Kills the workers of a kind, once some shards are done."""
    killed: list[psutil.Process] = []

    def kill() -> bool:
        if job.shards_done() >= shards_done:
            for worker in job.workers(kind):
                with contextlib.suppress(psutil.NoSuchProcess):  # a task that has just ended
                    worker.kill()
                    killed.append(worker)
        return bool(killed)

    job.until(kill)
    assert killed


@pytest.mark.slow
def test_a_killed_actor_costs_nothing_but_time(tmp_path: Path, bundle: Path, images: Path, undisturbed: Rows) -> None:
    with Job(bundle, images, tmp_path / "table") as job:
        for done in (0, 6):  # while the model is loaded, and in the middle
            kill_workers(job, "MapBatches(ShardActor)", shards_done=done)
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["skipped"]) == (len(undisturbed), 0)
    assert_same_rows(rows_of(tmp_path / "table"), undisturbed)


@pytest.mark.slow
def test_a_killed_task_that_decodes_costs_nothing_but_time(
    tmp_path: Path, bundle: Path, images: Path, undisturbed: Rows
) -> None:
    with Job(bundle, images, tmp_path / "table", "--decode", "tasks") as job:
        for done in (1, 8):
            kill_workers(job, "MapBatches(ShardTask)", shards_done=done)
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["skipped"]) == (len(undisturbed), 0)
    assert_same_rows(rows_of(tmp_path / "table"), undisturbed)


# --- images that are dangerous ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dangerous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images, of which three do something to whoever decodes them."""
    folder = tmp_path_factory.mktemp("dangerous")
    dangers = {15: "crash", 55: "hang", 95: "memory"}
    for number in range(120):
        comment = {"comment": f"danger:{dangers[number]}"} if number in dangers else {}
        squares(number, width=60, height=50).save(folder / f"{number:03d}.jpg", quality=95, **comment)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["actor", pytest.param("tasks", marks=pytest.mark.chaos)])
def test_a_decoder_that_crashes_or_hangs_costs_the_one_image(
    tmp_path: Path, bundle: Path, dangerous: Path, decode: str
) -> None:
    flags = ("--image-timeout-s", "3", "--decode", decode)
    with Job(bundle, dangerous, tmp_path / "table", *flags, PYTHONPATH=str(CRASHING)) as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["ok"], result["errors"]) == (120, 117, 3)
    rows = rows_of(tmp_path / "table")
    assert {Path(uri).name: (row["status"], row["error"]) for uri, row in rows.items() if row["status"] != "ok"} == {
        "015.jpg": ("failed", "the decoder crashed (SIGSEGV)"),
        "055.jpg": ("failed", "decoding took longer than 3 s"),
        "095.jpg": ("too_large", "it does not fit in memory"),
    }
    opened = load_bundle(bundle)
    for uri in (str(dangerous / "014.jpg"), str(dangerous / "119.jpg")):
        assert rows[uri]["probabilities"] == pytest.approx(opened.predict(uri).probabilities.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def many_dangerous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images, of which one in each shard crashes."""
    folder = tmp_path_factory.mktemp("many_dangerous")
    for number in range(200):
        comment = {"comment": "danger:crash"} if number % SHARD == SHARD // 2 else {}
        squares(number, width=60, height=50).save(folder / f"{number:03d}.jpg", quality=95, **comment)
    return folder


@pytest.mark.slow
def test_many_images_that_crash_do_not_end_the_job(tmp_path: Path, bundle: Path, many_dangerous: Path) -> None:
    flags = ("--max-failures", "2")
    with Job(bundle, many_dangerous, tmp_path / "table", *flags, PYTHONPATH=str(CRASHING)) as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["ok"], result["errors"]) == (190, 10)
