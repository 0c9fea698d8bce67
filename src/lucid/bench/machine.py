"""What the figures were measured on."""

from __future__ import annotations

import math
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import lucid
from lucid.engine import cpu


def description(build: str = lucid.__version__) -> dict[str, str]:
    """Return machine, versions and date, each as a line for people; `build` is which lucid-optim it is."""
    return {
        "CPU": f"{cpu_model()}, {cores()} cores usable, {_caches()}",
        "memory": f"{total_memory() / 2**30:.0f} GiB, transparent huge pages: {_huge_pages()}",
        "system": f"{platform.system()} {platform.release()}, governor: {_governor()}",
        "threads": f"{torch.get_num_threads()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lucid-optim {build}, SIMD level {cpu.simd_level()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


BUSY = 0.03  # part of all cores' time that others may take before figures are not for quoting


class Neighbours:
    """How much of the machine others take from here on: other processes, and the hypervisor."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._others = self._others_seconds()

    @staticmethod
    def _others_seconds() -> float:
        """CPU seconds since boot that were neither idle nor this process's or its children's."""
        fields = _read(Path("/proc/stat")).partition("\n")[0].split()[1:9]
        if len(fields) < 8:
            return math.nan
        user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, fields)
        ticks = user + nice + system + irq + soft_irq + steal
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - sum(own[:4])

    def share(self) -> float:
        """Return their part of all cores' time until now; NaN where the system does not tell."""
        passed = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        return (self._others_seconds() - self._others) / passed


def total_memory() -> float:
    """Return the machine's memory in bytes; NaN where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return math.nan
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def free_memory() -> float:
    """Return how many bytes could be had without swapping; infinite where the system does not tell."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


def last_level_cache() -> int:
    """Return its size in bytes, as the kernel tells it; 32 MiB where it does not."""
    sizes = _cache_sizes()
    return sizes[max(sizes)] if sizes else 32 * 2**20


def _cache_sizes() -> dict[int, int]:
    """By level, the bytes of one data or unified cache."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = _read(index / "size")
        if _read(index / "type") in ("Data", "Unified") and size.endswith("K"):
            sizes[int(_read(index / "level"))] = int(size[:-1]) * 1024
    return sizes


def _caches() -> str:
    sizes = sorted(_cache_sizes().items())
    return ", ".join(f"L{level} {size // 1024:,} KiB" for level, size in sizes) or "caches unknown"


def cpu_model() -> str:
    """Return what the system calls its processor."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _governor() -> str:
    return _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or "unknown"


def _huge_pages() -> str:
    modes = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return modes.partition("[")[2].partition("]")[0] or "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
