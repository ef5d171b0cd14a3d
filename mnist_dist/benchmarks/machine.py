"""What a figure was measured on."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """Cores and processor, such as `2 cores, AMD EPYC`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"
