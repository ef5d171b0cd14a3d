"""What this machine's processor is, and what it computes with, as Linux tells it (`/proc/cpuinfo`)."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def name() -> str:
    """Such as `AMD EPYC 7R13`; the architecture where nothing better is known."""
    return _field("model name") or platform.machine()


def flags() -> tuple[str, ...]:
    """Its instruction sets, as `/proc/cpuinfo` lists them; empty where it lists none."""
    return tuple(_field("flags").split())


def has_bfloat16() -> bool:
    """Whether it has units for bfloat16: AVX512-BF16 or AMX. Others only pretend to compute in it, or do so slowly."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags())


def usable_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def described() -> str:
    """What a figure was measured on, such as `2 cores, AMD EPYC 7R13`."""
    return f"{usable_cpus()} cores, {name()}"


def _field(wanted: str) -> str:
    """Of the first core; empty where there is none."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for field, _, value in fields if field.strip() == wanted), "")
