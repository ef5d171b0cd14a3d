"""attempt: what a failure of Ray Train means to a person (attempts themselves: test_train.py)."""

import pytest
from ray.exceptions import ActorDiedError

from mnist_dist.errors import DataError, ServiceError, WorkersFailed
from mnist_dist.on_ray.training.attempt import readable


class Failed(Exception):
    """Ray Train's WorkerGroupError, as far as it is read."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = worker_failures


class Unhealthy(Exception):
    """Ray Train's WorkerHealthCheckFailedError, as far as it is read."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


def raised_from(cause: Exception) -> Exception:
    error = RuntimeError("the wrapping")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [ServiceError("the disk is full"), raised_from(ServiceError("the disk is full"))])
def test_an_error_of_ours_is_found_in_whichever_worker(error: Exception) -> None:
    found = readable(Failed({0: RuntimeError("collective aborted"), 1: error}))
    assert isinstance(found, ServiceError)
    assert str(found) == "the disk is full"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Failed({2: KeyError("x"), 1: ValueError("first line\nsecond")}), "worker 1 failed: ValueError: first line "),
        (Failed({0: MemoryError()}), "worker 0 failed: MemoryError: no message "),
        (Failed({3: Unhealthy(ActorDiedError())}), "worker 3 failed: ActorDiedError: The actor died unexpectedly"),
        (OSError("no room"), "worker ? failed: OSError: no room "),
    ],
)
def test_other_errors_keep_the_first_workers_words(error: Exception, words: str) -> None:
    found = readable(error)
    assert type(found) is WorkersFailed
    assert str(found).startswith(words)


def test_the_first_error_of_ours_wins_over_later_ones() -> None:
    found = readable(Failed({1: ServiceError("later"), 0: DataError("earlier")}))
    assert str(found) == "earlier"
