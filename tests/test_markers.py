"""markers: what workers leave for each other."""

import contextlib
from pathlib import Path

import pytest

from mnist_dist.data.markers import Attempt, Markers
from mnist_dist.errors import DecoderStuck, ServiceError, WorkersFailed


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path)
    return f"{root}/work"


def test_deaths_are_counted_by_driver_and_by_all(folder: str) -> None:
    first = Markers(folder, run_id="one", max_deaths=5)
    second = Markers(folder, run_id="two", max_deaths=5)
    assert [first.begin("shard-000007.scoring") for _ in range(2)] == [Attempt(1, 1), Attempt(2, 2)]
    assert [second.begin("shard-000007.scoring") for _ in range(2)] == [Attempt(1, 3), Attempt(2, 4)]
    assert first.begin("shard-000008.scoring") == Attempt(1, 1)


def test_drivers_at_the_same_work_do_not_hide_each_other_s_deaths(folder: str) -> None:
    first, second = (Markers(folder, run_id=run_id, max_deaths=5) for run_id in ("one", "two"))
    attempts = [markers.begin("shard-000007.decoding") for markers in (first, second, first, second, first)]
    assert [attempt.of_run for attempt in attempts] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("attempt", "suspect"),
    [(Attempt(1, 1), False), (Attempt(1, 2), False), (Attempt(2, 2), True), (Attempt(1, 3), True)],
)
def test_one_killed_driver_makes_no_work_suspect(attempt: Attempt, suspect: bool) -> None:
    assert attempt.is_suspect == suspect


def test_too_many_deaths_are_told(folder: str) -> None:
    markers = Markers(folder, run_id="one", max_deaths=2)
    for _ in range(3):
        markers.begin("shard-000001.decoding")
    with pytest.raises(WorkersFailed, match=r"3 processes died while working on shard-000001.decoding"):
        markers.begin("shard-000001.decoding")
    assert Markers(folder, run_id="two", max_deaths=2).begin("shard-000001.decoding").of_run == 1


@pytest.mark.parametrize("end", [None, ServiceError("the token expired"), OSError("disk")])
def test_work_that_ended_without_a_death_is_not_counted(folder: str, end: Exception | None) -> None:
    markers = Markers(folder, run_id="one", max_deaths=0)
    for _ in range(3):
        with contextlib.suppress(ServiceError, OSError), markers.trying("shard-000001.scoring") as attempt:
            assert attempt == Attempt(1, 1)
            if end is not None:
                raise end


def test_a_stuck_decoder_is_a_death(folder: str) -> None:
    markers = Markers(folder, run_id="one", max_deaths=1)
    for of_run in (1, 2):
        with contextlib.suppress(DecoderStuck), markers.trying("shard-000001.scoring") as attempt:
            assert attempt.of_run == of_run
            raise DecoderStuck("hangs")
    with pytest.raises(WorkersFailed, match="2 processes died"):
        markers.begin("shard-000001.scoring")


def test_an_error_that_could_not_be_delivered_is_found(folder: str) -> None:
    markers = Markers(folder, run_id="one", max_deaths=0)
    markers.note_failure(4, ServiceError("the token expired"))
    found = markers.failure_of(4)
    assert isinstance(found, ServiceError)
    assert str(found) == "the token expired"
    assert "shard 5 was not finished" in str(markers.failure_of(5))
    assert "shard 4 was not finished" in str(Markers(folder, run_id="two", max_deaths=0).failure_of(4))
