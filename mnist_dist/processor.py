"""This machine's processor and its instruction sets, read from Linux's `/proc/cpuinfo`."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


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
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
