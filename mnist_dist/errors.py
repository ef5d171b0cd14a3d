"""Every error that mnist_dist raises on purpose, in one tree.

```
MnistDistError                exit 1: the work started and could not be finished
├── ImageError                one image; it becomes a row or a count, never an exit code
├── Judged                    the work is done, but the result is not good enough
│   ├── TooManyBadImages      more bad images than --max-bad-fraction allows, or no good one
│   └── ChecksFailed          at least one check of `jobs.doctor` failed
├── LabelsUnmatched           the given labels belong to no image of the table, or are none of its classes
├── TrainingDiverged          the loss is not a number
├── CannotCombine             a combined model does not predict what its members say
├── OutOfMemory               a training needs more memory than its workers have
├── StepFailed                a process that converts or checks a model failed
│   └── StepKilled            a signal ended it, as the kernel's does where memory is short
├── WorkersFailed             a worker died more often than --max-failures allows
│   └── DecoderStuck          an image takes too long in a thread that cannot be stopped
├── Interrupted               SIGINT or SIGTERM; the progress is saved (exit 130 or 143)
├── LockLost                  another driver has taken over the run or output of this one
├── ServiceError              a whole service failed: expired token, no connection, disk full
└── ConfigError (ValueError)  exit 2: wrong usage or configuration, found before any work starts
    ├── DataError             the given data cannot be used: unknown, empty, corrupt, only one class
    ├── WeightsError          the given weights cannot be used: missing, for another network, no download
    ├── BundleError           a folder is not a bundle, or a file in it has changed since it was written
    ├── ResumeConflict        the name holds a run with another configuration
    ├── Locked                another driver is working on the same run or output
    ├── ResourceError         the cluster has less than was requested
    └── StorageError          the storage cannot be written or read
```

Messages name the place and what is allowed, and end in `Received: ...`. Every class can be rebuilt from its
arguments, so that pickle carries it between processes.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class MnistDistError(Exception):
    """Base of every error raised on purpose; a job that fails with it exits with `exit_code`."""

    exit_code = 1


class ImageError(MnistDistError):
    """One image that cannot be used.

    Args:
        status: a status of the prediction table: `missing`, `denied`, `empty`, `truncated`, `unreadable`,
            `unsupported`, `too_large`, `failed`.
        message: one line for the user.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


class Judged(MnistDistError):
    """The work is done, but the result is not good enough.

    Args:
        message: the reason.
        result: the keys of the job's JSON line.
    """

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, result)
        self.message, self.result = message, dict(result or {})

    def __str__(self) -> str:
        return self.message


class TooManyBadImages(Judged):
    """More images are bad than the job allows, or none is good; the message says how many and which."""


class ChecksFailed(Judged):
    """At least one check of the set-up failed; the message says which and on which node."""


class LabelsUnmatched(MnistDistError):
    """The given labels belong to no image of the table, or none of them is a class; the message says what would fit."""


class StepFailed(MnistDistError):
    """A process that converts or checks a model failed; the message ends with its last output."""


class StepKilled(StepFailed):
    """A signal ended the process, such as SIGKILL where memory is short."""


class CannotCombine(MnistDistError):
    """A combined model does not predict what its members say."""


class OutOfMemory(MnistDistError):
    """A training needs more memory than its workers have; the message says which batch size would fit."""


class TrainingDiverged(MnistDistError):
    """The loss is no longer a finite number; the message names phase, epoch and step."""


class WorkersFailed(MnistDistError):
    """Workers died or raised more often than the job allows."""


class DecoderStuck(WorkersFailed):
    """A thread hangs in a decoder; only ending its process stops it."""


class Interrupted(MnistDistError):
    """A signal stopped the job after it had saved its progress.

    Args:
        signal_number: the signal, 2 (SIGINT) or 15 (SIGTERM); the exit code is 128 plus this number.
        message: what was saved and how to resume.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)
        self.exit_code = 128 + signal_number
        self.message = message

    def __str__(self) -> str:
        return self.message


class LockLost(MnistDistError):
    """Another driver has taken over the run or output of this one, which was silent for too long."""


class ServiceError(MnistDistError):
    """A whole service failed, not a single object; no work in flight may be committed."""


class ConfigError(MnistDistError, ValueError):
    """Wrong usage or configuration, found before any work started."""

    exit_code = 2


class DataError(ConfigError):
    """The given data cannot be used."""


class WeightsError(ConfigError):
    """The given weights cannot be used."""


class BundleError(ConfigError):
    """A folder is not a bundle, or its files have changed since it was written."""


class ResumeConflict(ConfigError):
    """The name already holds a run with another configuration."""


class Locked(ConfigError):
    """Another driver is working on the same run or output."""


class ResourceError(ConfigError):
    """The cluster has fewer resources than the job requests."""


class StorageError(ConfigError):
    """The storage cannot be written or read."""


def suggestion(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for a misspelt name, or nothing if no name is close to it."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for display."""
    return (str(error).strip() or "no message").splitlines()[0]
