"""What this process may use of its machine: processor, instruction sets, memory; read from Linux's files."""

import contextlib
import math
import os
import platform
import subprocess
from pathlib import Path

import psutil

GPU_TIMEOUT_S = 30.0
CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
"""The limits of this container. Source: the kernel's cgroup-v2.rst."""


def name() -> str:
    """The processor's name, such as `AMD EPYC 7R13`; the architecture if the name is unknown."""
    return _field("model name") or platform.machine()


def flags() -> tuple[str, ...]:
    """The instruction sets that `/proc/cpuinfo` lists; empty if it lists none."""
    return tuple(_field("flags").split())


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 units (AVX512-BF16 or AMX). Others emulate bfloat16, or compute it slowly."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags())


def usable_cpus() -> int:
    """Number of cores that this process may use, within its container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # There is no quota ("max"), or another format.
        quota, period = (CGROUP / "cpu.max").read_text().split()
        cpus = min(cpus, max(1, math.ceil(int(quota) / int(period))))
    return cpus


def memory_bytes() -> int:
    """Memory that this process may use, free or not, within its container's limit."""
    memory = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int((CGROUP / "memory.max").read_text()))
    return memory


def free_memory_bytes() -> int:
    """Free memory of the machine, or of its container if that has less."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # There is no limit ("max"), or another format.
        limit = int((CGROUP / "memory.max").read_text())
        stat = _counters(CGROUP / "memory.stat")
        used = int((CGROUP / "memory.current").read_text()) - stat["inactive_file"]  # Linux can drop cached files.
        free = min(free, limit - used)
    return free


def killed_for_memory() -> int | None:
    """How many processes the kernel has killed for lack of memory: in this container, else on this machine. None: not
    known. Source: the kernel's cgroup-v2.rst, `oom_kill` in memory.events."""
    for path in (CGROUP / "memory.events", Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return _counters(path)["oom_kill"]
    return None


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU that this process may use. None: `nvidia-smi` does not tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command + ([f"--id={visible}"] if visible else []), capture_output=True, text=True, timeout=GPU_TIMEOUT_S
        )
        return min(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _counters(path: Path) -> dict[str, int]:
    """A file of lines `name number`."""
    return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines())}


def described() -> str:
    """Names the hardware of a measurement, such as `2 cores, AMD EPYC 7R13`."""
    return f"{usable_cpus()} cores, {name()}"


def _field(wanted: str) -> str:
    """A field of the first core; empty if there is none."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for field, _, value in fields if field.strip() == wanted), "")
