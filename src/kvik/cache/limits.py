"""How much memory there is, limits of a container included."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def memory_available(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process can still take: the least of what the system and its control group leave."""
    candidates = [_meminfo(meminfo, "MemAvailable")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        bound = _number(cgroup / limit)
        if bound is not None:
            candidates.append(max(bound - (_number(cgroup / used) or 0), 0))
    return min((c for c in candidates if c is not None), default=4 << 30)


def memory_total(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process could take on an idle machine."""
    bounds = (_number(cgroup / "memory.max"), _number(cgroup / "memory/memory.limit_in_bytes"))
    return min((c for c in (_meminfo(meminfo, "MemTotal"), *bounds) if c is not None), default=8 << 30)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" = no limit


def _meminfo(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
