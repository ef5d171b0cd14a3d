"""attempts: what workers leave for each other."""

from pathlib import Path

import pytest

from mnist_dist import storage
from mnist_dist.errors import ServiceError, WorkersFailed
from mnist_dist.scoring.attempts import Attempt, Attempts
from mnist_dist.scoring.generations import Generation


@pytest.fixture(params=["local", "s3"])
def generation(request: pytest.FixtureRequest, tmp_path: Path) -> Generation:
    root = str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path)
    return Generation(3, f"{root}/_work/g0003", {"model_id": "m"})


def test_deaths_are_counted_by_driver_and_by_all(generation: Generation) -> None:
    first = Attempts(generation, run_id="one", most=5)
    second = Attempts(generation, run_id="two", most=5)
    assert [first.begin("shard-000007.scoring") for _ in range(2)] == [Attempt(1, 1), Attempt(2, 2)]
    assert [second.begin("shard-000007.scoring") for _ in range(2)] == [Attempt(1, 3), Attempt(2, 4)]
    assert first.begin("shard-000008.scoring") == Attempt(1, 1)


@pytest.mark.parametrize(
    ("attempt", "suspect"),
    [(Attempt(1, 1), False), (Attempt(1, 2), False), (Attempt(2, 2), True), (Attempt(1, 3), True)],
)
def test_one_killed_driver_makes_no_work_suspect(attempt: Attempt, suspect: bool) -> None:
    assert attempt.is_suspect == suspect


def test_too_many_deaths_are_told(generation: Generation) -> None:
    attempts = Attempts(generation, run_id="one", most=2)
    for _ in range(3):
        attempts.begin("shard-000001.decoding")
    with pytest.raises(WorkersFailed, match=r"shard-000001.decoding ended 3 processes that were at it"):
        attempts.begin("shard-000001.decoding")
    assert Attempts(generation, run_id="two", most=2).begin("shard-000001.decoding").of_run == 1


def test_work_that_ended_without_a_death_is_not_counted(generation: Generation) -> None:
    attempts = Attempts(generation, run_id="one", most=0)
    for _ in range(3):
        assert attempts.begin("shard-000001.scoring") == Attempt(1, 1)
        attempts.take_back("shard-000001.scoring")
    attempts.take_back("never begun")


def test_an_error_that_could_not_be_delivered_is_found(generation: Generation) -> None:
    attempts = Attempts(generation, run_id="one", most=0)
    attempts.note_failure(4, ServiceError("the token expired"))
    found = attempts.failure_of(4)
    assert isinstance(found, ServiceError)
    assert str(found) == "the token expired"
    assert "shard 5 was not done" in str(attempts.failure_of(5))
    assert "shard 4 was not done" in str(Attempts(generation, run_id="two", most=0).failure_of(4))


def test_markers_are_no_shards(generation: Generation) -> None:
    attempts = Attempts(generation, run_id="one", most=0)
    attempts.begin("shard-000004.scoring")
    attempts.note_failure(4, ServiceError("x"))
    storage.write_bytes(generation.shard_uri(2), b"rows")
    assert generation.done_shards() == {2}
