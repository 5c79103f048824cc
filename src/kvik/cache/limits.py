"""How much memory there is, and how much of the processors, limits of a container included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvik.errors import BudgetError, UsageError

_CGROUP, _MEMINFO, _OWN = Path("/sys/fs/cgroup"), Path("/proc/meminfo"), Path("/proc/self/cgroup")
# (folder under the root, limit, use): control groups of version 2, and of version 1
_FILES = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))


def check_budget(budget: int, available: int) -> None:
    """Raises UsageError or BudgetError where a cache can't have so many bytes."""
    if budget < 0:
        raise UsageError(f"a cache of {budget} bytes: give a positive number")
    if budget > available:
        raise BudgetError(
            f"a cache of {budget:,} bytes is more than the {available:,} that this machine has left; ask for less",
            needed=budget, available=available,
        )  # fmt: skip


def memory_available(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO, own: Path = _OWN) -> int:
    """Bytes that this process can still take: the least of what the system and each of its control groups leave.

    What a group holds of files that nobody needs right now (`inactive_file`) counts as free.
    """
    left = [_meminfo(meminfo, "MemAvailable")]
    for folder, limit, used in _groups(cgroup, own):
        bound = _number(folder / limit)
        if bound is not None:
            left.append(max(bound - max((_number(folder / used) or 0) - _inactive(folder), 0), 0))
    return min((bytes_left for bytes_left in left if bytes_left is not None), default=4 << 30)


def memory_total(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO, own: Path = _OWN) -> int:
    """Bytes that this process could take on an idle machine."""
    bounds = [_number(folder / limit) for folder, limit, _ in _groups(cgroup, own)]
    return min((c for c in (_meminfo(meminfo, "MemTotal"), *bounds) if c is not None), default=8 << 30)


def processors_allowed(cgroup: Path = _CGROUP, own: Path = _OWN) -> float | None:
    """How many processors' time this process's control groups leave it, in sum; None = no limit."""
    shares = []
    for folder in _folders(cgroup, own, ""):  # version 2: "200000 100000", or "max 100000"
        words = "".join(_lines(folder / "cpu.max")).split()
        if len(words) == 2 and all(word.isdecimal() for word in words):
            shares.append(int(words[0]) / int(words[1]))
    for folder in _folders(cgroup, own, "cpu"):  # version 1; -1 = no limit
        quota, period = (_number(folder / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
        if quota is not None and period:
            shares.append(quota / period)
    return min(shares, default=None)


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, str, str]]:
    """(folder, limit's file, use's file) of this process's control groups and of all above them."""
    for below, limit, used in _FILES:
        for folder in _folders(root, own, below):
            yield folder, limit, used


def _folders(root: Path, own: Path, below: str) -> Iterator[Path]:
    """Of this process's control group, and of all above it."""
    base = root / below
    mine = base / _own_path(own, below)
    for folder in (mine, *mine.parents):
        if folder == base or base in folder.parents:
            yield folder


def _own_path(own: Path, controller: str) -> str:
    """This process's group: lines of the file are `number:controllers:/path`."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.strip().lstrip("/")
    return ""


def _inactive(folder: Path) -> int:
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    return next((int(pair[1]) for pair in pairs if pair[0] in ("inactive_file", "total_inactive_file")), 0)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None  # "max" = no limit


def _meminfo(path: Path, name: str) -> int | None:
    return next((int(line.split()[1]) * 1024 for line in _lines(path) if line.startswith(f"{name}:")), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
