"""The shard runner on a private Ray: every shard once, errors as they were raised, deaths counted."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from harness import Recorder
from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value

from mnist_dist.console import Stop
from mnist_dist.data.markers import Attempt
from mnist_dist.errors import ConfigError, Interrupted, MnistDistError, WorkersFailed
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.cluster import connected
from mnist_dist.on_ray.shard_runner import SECONDS_BETWEEN_ANSWERS, Counter, Ran, ShardWork, run_shards
from mnist_dist.session import Session

TWO_ACTORS = Actors(count=2, cpus=0.5, gpus=0, decode_in_tasks=False)
SHARDS = [0, 1, 3, 4, 7]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    register_pickle_by_value(sys.modules[__name__])  # the workers do not have this folder on their path
    with connected(verbose=False):
        yield
    unregister_pickle_by_value(sys.modules[__name__])


class Squaring:
    """Writes the square of its shard; some shards go wrong."""

    title = "squaring"

    def __init__(self, folder: Path, *, wrong: dict[int, str] | None = None) -> None:
        self._folder, self._wrong = folder, wrong or {}
        self._opened = 0

    def open(self) -> None:
        if "open" in self._wrong.values():
            raise ConfigError("it does not open")
        self._opened += 1

    def work(self, shard: int, given: Any, *, attempt: Attempt, counter: Counter) -> int:
        assert self._opened == 1
        match self._wrong.get(shard):
            case "raise":
                raise MnistDistError(f"shard {shard} is wrong")
            case "bug":
                raise ZeroDivisionError("a bug")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die once" if not attempt.is_suspect:
                os.kill(os.getpid(), signal.SIGKILL)
            case "die after an answer, then raise":
                if attempt.is_suspect:
                    raise MnistDistError(f"shard {shard} is wrong")
                counter.add(1, 0)
                time.sleep(4 * SECONDS_BETWEEN_ANSWERS)  # an answer with news is sent meanwhile
                os.kill(os.getpid(), signal.SIGKILL)
            case "never end":
                (self._folder / "begun").touch()
                threading.Event().wait()
        (self._folder / f"{shard}").write_text(f"{shard**2}")
        counter.add(10, 1)
        return shard**2 + (given or 0)


def thousand_of(shard: int) -> int:
    return 1000 * shard


def run(folder: Path, *, stop: Stop | None = None, wrong: dict[int, str] | None = None, **more: Any) -> Ran[int]:
    work = ShardWork(
        worker=Squaring(folder, wrong=wrong),
        done=lambda: {int(path.name) for path in folder.iterdir() if path.name.isdigit()},
        folder=str(folder),
        max_deaths=1,
        actors=TWO_ACTORS,
    )
    session = Session(console=Recorder(), stop=stop or Stop(Recorder()))
    return run_shards(replace(work, **more), SHARDS, session, title="squaring", done=22, total=77)


@pytest.mark.parametrize("more", [{}, {"actors": None}, {"shards_at_once": 2}], ids=["actors", "tasks", "two at once"])
def test_every_shard_is_done_and_reported(tmp_path: Path, more: dict[str, Any]) -> None:
    ran = run(tmp_path, given=thousand_of, **more)
    assert {report.shard: report.content for report in ran.reports} == {n: n**2 + 1000 * n for n in SHARDS}
    # No marker of a shard is left; an actor that was not needed may have been ended while it opened.
    assert sorted(path.name for path in tmp_path.iterdir() if "actor-" not in path.name) == sorted(map(str, SHARDS))


def test_a_task_before_hands_over_what_it_gives(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    ran = run(tmp_path, before=Squaring(before))
    assert {report.shard: report.content for report in ran.reports} == {n: 2 * n**2 for n in SHARDS}


@pytest.mark.parametrize("more", [{}, {"actors": None}], ids=["actors", "tasks"])
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ("raise", MnistDistError, "^shard 3 is wrong$"),
        ("bug", WorkersFailed, "squaring failed: ZeroDivisionError: a bug"),
        ("open", ConfigError, "^it does not open$"),
    ],
)
def test_an_error_is_raised_as_it_was(
    tmp_path: Path, wrong: str, error: type[Exception], words: str, more: dict[str, Any]
) -> None:
    with pytest.raises(error, match=words):
        run(tmp_path, wrong={3: wrong}, **more)
    assert not list(tmp_path.glob("*.error"))


@pytest.mark.parametrize("more", [{}, {"actors": None}], ids=["actors", "tasks"])
def test_an_error_of_a_second_try_with_fewer_answers_is_raised_as_it_was(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(MnistDistError, match=r"^shard 3 is wrong$"):
        run(tmp_path, wrong={3: "die after an answer, then raise"}, **more)


def test_an_error_of_the_task_before_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(MnistDistError, match=r"^shard 4 is wrong$"):
        run(tmp_path, before=Squaring(tmp_path, wrong={4: "raise"}))


@pytest.mark.parametrize("more", [{}, {"actors": None}], ids=["actors", "tasks"])
def test_a_process_that_dies_costs_nothing_but_its_shard_s_first_try(tmp_path: Path, more: dict[str, Any]) -> None:
    ran = run(tmp_path, wrong={4: "die once"}, **more)
    assert {report.shard for report in ran.reports} >= {4}
    assert {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()} == set(SHARDS)


def test_a_shard_that_ends_every_process_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed, match=r"2 processes died while working on shard-000004.squaring"):
        run(tmp_path, wrong={4: "die"})


def test_a_signal_ends_it(tmp_path: Path) -> None:
    stop = Stop(Recorder())
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted, match="same command"):
        run(tmp_path, stop=stop)
    assert ray.is_initialized()


@pytest.mark.parametrize("more", [{}, {"actors": None}], ids=["actors", "tasks"])
def test_a_signal_ends_ray_data_though_a_shard_has_no_news(tmp_path: Path, more: dict[str, Any]) -> None:
    with Stop(Recorder()) as stop:

        def send_signal() -> None:
            while not (tmp_path / "begun").exists():
                time.sleep(0.05)
            stop.signal_number = signal.SIGTERM

        threading.Thread(target=send_signal, daemon=True).start()
        with pytest.raises(Interrupted):
            run(tmp_path, stop=stop, wrong={3: "never end"}, **more)
    assert not [thread for thread in threading.enumerate() if thread.name == "ray-data"]
