"""The processor as far as speed depends on it: what the system tells without measuring."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from kvik.cache.limits import memory_available, memory_total, processors_allowed

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Processor:
    """What one process may use of this machine.

    Attributes:
        name: of the processor.
        cores: that this process may run on (its affinity).
        quota: processors' time that a container's limits leave it, in sum; None = no limit.
        last_cache: bytes of the largest cache that a core sees; None where the system does not tell.
        memory: bytes that this process could take on an idle machine.
        free: bytes that it can take now.
        load: processes that ran or waited over the last minute, this one included.
    """

    name: str
    cores: int
    quota: float | None
    last_cache: int | None
    memory: int
    free: int
    load: float

    @property
    def usable(self) -> float:
        """Cores that threads can really run on."""
        return self.cores if self.quota is None else min(self.cores, self.quota)


def processor() -> Processor:
    """This machine's, now."""
    return Processor(
        name=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        quota=processors_allowed(),
        last_cache=last_cache(),
        memory=memory_total(),
        free=memory_available(),
        load=os.getloadavg()[0],
    )


def cpu_name() -> str:
    """The processor's name, or its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


def last_cache(folder: Path = _CACHES) -> int | None:
    """Bytes of the largest cache, as Linux lists them; None where it does not."""
    sizes = []
    for file in folder.glob("index*/size"):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text[:-1].isdecimal() and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=None)


def stolen() -> tuple[int, int]:
    """Ticks of all processors since the machine started: (taken by other guests of the same host, all)."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else (0, 0)
