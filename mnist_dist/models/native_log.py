"""Keeps what TensorFlow and ONNX Runtime log while they start off the user's stderr, and nothing else.

Owns: which lines these are, and the file descriptor while they are written. Does not own: what jobs show (`console`).

TensorFlow 2.21 writes its first lines before it reads `TF_CPP_MIN_LOG_LEVEL`, from C++ and to file descriptor 2, so
only the descriptor can be held. Nothing stays changed: not the environment, no level of a log, no warning filter.
Hidden lines go to this module's logger with level DEBUG. `TF_CPP_MIN_LOG_LEVEL=0` shows everything.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

log = logging.getLogger(__name__)

LEVEL = "TF_CPP_MIN_LOG_LEVEL"
STDERR = 2  # The file descriptor.
_STARTING = re.compile(
    rb"""
    WARNING:\ All\ log\ messages\ before\ absl::InitializeLog
    | [IW]\d{4}\ [\d:.]+ \s+ \d+ \s [\w./-]+:\d+\]          # absl: information and warnings, no errors
    | \d{4}-\d\d-\d\d\ [\d:.]+:\ [IW]\ [\w./-]+:\d+\]       # TensorFlow before absl
    | E\d{4}\ [\d:.]+ \s+ \d+ \s cuda_\w+\.cc:\d+\]\ failed\ call\ to\ cuInit   # no GPU: no error on a CPU
    | To\ enable\ the\ following\ instructions:             # The second line of a message about the CPU.
    | (\x1b\[[\d;]*m)? \d{4}-\d\d-\d\d\ [\d:.]+\ \[W:onnxruntime:.*device_discovery
    """,
    re.VERBOSE,
)
_ONE_AT_A_TIME = threading.RLock()  # There is one file descriptor 2.


@contextlib.contextmanager
def starting_quietly() -> Iterator[None]:
    """A block in which a framework is loaded and called for the first time. What it writes to stderr is shown
    afterwards, without the lines of a start that went well; all of it, if the block raises."""
    if os.environ.get(LEVEL) == "0" or not _is_open(STDERR):
        yield
        return
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as kept:
        original, went_well = os.dup(STDERR), False
        _flush()
        os.dup2(kept.fileno(), STDERR)
        try:
            yield
            went_well = True
        finally:
            _flush()
            os.dup2(original, STDERR)
            with contextlib.suppress(OSError):  # Nobody reads it any more.
                _pass_on(kept, original, went_well=went_well)
            os.close(original)


def _pass_on(kept: IO[bytes], original: int, *, went_well: bool) -> None:
    kept.seek(0)
    for line in kept:
        if went_well and _STARTING.match(line):
            log.debug("%s", line.decode(errors="replace").rstrip())
        else:
            os.write(original, line)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # There is no stderr, or it is closed.
        sys.stderr.flush()
