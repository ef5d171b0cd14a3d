"""Makes images dangerous: Python imports this into every process of a job that has this folder on its PYTHONPATH.

Stands in for the faults of a native decoder. A JPEG with the bytes `danger:crash`, `danger:hang` or `danger:memory` in
a comment does that to the process that decodes it.
"""

import ctypes
import os
import resource
import signal
import threading
from typing import Any

import numpy as np
import simplejpeg

_decode_jpeg = simplejpeg.decode_jpeg


def _dangerous(data: bytes, *arguments: Any, **options: Any) -> Any:
    if b"danger:crash" in data:
        ctypes.string_at(0)
    if b"danger:hang" in data:
        threading.Event().wait()
    if b"danger:memory" in data:
        _take_all_memory()
    return _decode_jpeg(data, *arguments, **options)


def _take_all_memory() -> None:
    """Where nothing limits the process, what the kernel does in the end, without the way there."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        os.kill(os.getpid(), signal.SIGKILL)
    held = []
    while True:
        held.append(np.empty(1 << 30, np.uint8))


simplejpeg.decode_jpeg = _dangerous
