"""Every error that mnist_dist raises on purpose, in one tree.

```
MnistDistError                exit 1: the work was begun and could not be finished
├── ImageError                one image; it becomes a row or a count, never an exit code
├── Judged                    the work is done, and what came of it is not good enough
│   ├── TooManyBadImages      more unreadable images than --max-bad-fraction allows
│   └── ChecksFailed          the set-up breaks jobs: at least one check of `jobs.doctor` failed
├── TrainingDiverged          the loss is not a number
├── StepFailed                a process that converts or checks a model failed
├── WorkersFailed             a worker died more often than --max-failures allows
│   └── DecoderStuck          an image takes longer than it may, in a thread that nothing can end
├── Interrupted               SIGINT or SIGTERM: what was held is saved (exit 130 or 143)
├── ServiceError              a service, not one object: expired token, no connection, disk full
└── ConfigError (ValueError)  exit 2: wrong usage or configuration, found before any work is done
    ├── DataError             the data named cannot be used: unknown, empty, corrupt, one class only
    ├── WeightsError          the weights named cannot be used: missing, foreign, no network
    ├── BundleError           a folder is no bundle, or its file is not the one it was finished with
    ├── ResumeConflict        the name holds a run of another configuration
    ├── Locked                another driver is at work on the same run or output
    ├── ResourceError         the cluster has less than was asked for
    └── StorageError          the storage cannot be written or read
```

Messages name the place, what is allowed, and end in `Received: ...`. Every class is built from its arguments
alone, so that it crosses process borders by pickle.
"""

from collections.abc import Mapping
from typing import Any


class MnistDistError(Exception):
    """Base of every error raised on purpose; `exit_code` is what a job ends with."""

    exit_code = 1


class ImageError(MnistDistError):
    """One image that cannot be used.

    Args:
        status: one of the prediction table's words: `missing`, `denied`, `empty`, `truncated`, `unreadable`,
            `unsupported`, `too_large`, `failed`.
        message: one line for a person.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


class Judged(MnistDistError):
    """The work is done, and what came of it is not good enough.

    Args:
        message: why not.
        result: the keys of the job's JSON line.
    """

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, result)
        self.message, self.result = message, dict(result or {})

    def __str__(self) -> str:
        return self.message


class TooManyBadImages(Judged):
    """More images are unreadable than the job allows; the message says how many, and which."""


class ChecksFailed(Judged):
    """At least one check of a set-up failed; the message says which, and on which node."""


class StepFailed(MnistDistError):
    """A process that worked on a model failed; the message ends with what it said last."""


class TrainingDiverged(MnistDistError):
    """The loss stopped being a number; the message names phase, epoch and step."""


class WorkersFailed(MnistDistError):
    """Workers died, or raised, more often than the job allows."""


class DecoderStuck(WorkersFailed):
    """A thread hangs in a decoder; only the end of its process ends it."""


class Interrupted(MnistDistError):
    """A signal stopped the job after it had saved what it held.

    Args:
        signal_number: the signal, 2 (SIGINT) or 15 (SIGTERM); the exit code is 128 above it.
        message: what was saved and how to go on.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)
        self.exit_code = 128 + signal_number
        self.message = message

    def __str__(self) -> str:
        return self.message


class ServiceError(MnistDistError):
    """A service (not one object) failed; nothing of what is in flight may be committed."""


class ConfigError(MnistDistError, ValueError):
    """Wrong usage or configuration, found before any work was done."""

    exit_code = 2


class DataError(ConfigError):
    """The data that was named cannot be used."""


class WeightsError(ConfigError):
    """The weights that were named cannot be used."""


class BundleError(ConfigError):
    """A folder is not a bundle, or not the one that was finished."""


class ResumeConflict(ConfigError):
    """The name already holds a run with another configuration."""


class Locked(ConfigError):
    """Another driver is at work on the same run or output."""


class ResourceError(ConfigError):
    """The cluster has less than the job asks for."""


class StorageError(ConfigError):
    """The storage cannot be written or read."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for people."""
    return (str(error).strip() or "no message").splitlines()[0]
