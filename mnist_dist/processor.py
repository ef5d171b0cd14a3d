"""What this process may use of its machine: processor, instruction sets, memory; read from Linux's files."""

import contextlib
import math
import os
import platform
from pathlib import Path

import psutil

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
