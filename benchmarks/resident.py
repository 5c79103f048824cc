"""What a cache takes as the system counts it: resident memory before and after a prompt, beside the books.

    python benchmarks/resident.py [--tokens 4096] [--kv "bf16|int8|…"] [--json FILE]

Each spec has a process of its own. It loads the model and takes the whole prompt in **twice**. The first time makes
whatever the process keeps for good: weights' pages that are first read, the step's scratch, thread stacks, the
allocator's pools. Then the sequence is closed, which gives its slabs back to the system, and what is resident now is
the ground: the second time is measured against it. Before each reading Python's garbage is collected and the allocator
gives back what it can (`malloc_trim`).

    formula    `Spec.nbytes`: known before anything is allocated
    account    what the sequence says: its pages and tables
    slabs      what the cache says: whole slabs of 256 KiB, and the tables
    arena      system pages of the cache's mapping that lie in memory (/proc/self/pagemap)
    grown      resident memory of the process above the ground (smaps_rollup: Rss; Anonymous beside it)

Where rows leave at the prompt's end, a line `before` the last chunk settles stands above the one after. Resident memory
lies between account and slabs, to within what the process needs for its own books. Before it has chosen, a policy that
looks at the last queries holds them beside the rows: in no account, and gone once it has chosen.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvik.cache.arena import Arena
    from kvik.cache.sequence import Sequence

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

SPECS = "bf16|int8|int4|int8+keydiff:25%|int8+snapkv:25%|int8+window:512,sinks:4"
MIB, CHUNK = 1 << 20, 512


@dataclass(frozen=True)
class Memory:
    """Bytes of this process above some ground.

    Attributes:
        resident: all that lies in memory.
        anonymous: of that, what no file stands behind.
        arena: of that, what lies in the cache's mapping.
    """

    resident: int
    anonymous: int
    arena: int

    @classmethod
    def now(cls, arena: Arena) -> Memory:
        """Once all that can be given back has been."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        own = present(arena)
        with open("/proc/self/smaps_rollup") as rollup:
            total = sums(rollup)
        return cls(total["Rss"], total["Anonymous"], own)

    def above(self, ground: Memory) -> dict[str, int]:
        """By name."""
        return {name: value - getattr(ground, name) for name, value in vars(self).items()}


def present(arena: Arena) -> int:
    """Bytes of the cache's mapping that lie in memory."""
    first, page = arena.bytes.data_ptr(), mmap.PAGESIZE
    slabs = max((arena.touched(size) * size for size in arena.classes), default=0) // arena.slab_bytes + 1
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(first // page * 8)
        entries = np.frombuffer(pagemap.read(slabs * arena.slab_bytes // page * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * page


def sums(lines: Iterable[str]) -> dict[str, int]:
    """Bytes by name, of an smaps_rollup file.

    >>> sums(["10-20 ---p 0 0:0 0 [rollup]", "Rss: 4 kB", "Anonymous: 8 kB", "VmFlags: rd"])
    {'Rss': 4096, 'Anonymous': 8192}
    """
    words = [line.split() for line in lines]
    return {name[:-1]: int(rest[0]) * 1024 for name, *rest in words if name.endswith(":") and rest[-1:] == ["kB"]}


def one(kv: str, tokens: int, model_name: str, weights: str) -> dict[str, Any]:
    """Everything about one spec, measured in this process."""
    import kvik
    from kvik.engine.generation import room

    model = kvik.load(model_name, weights=weights)  # type: ignore[arg-type]
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[:tokens]
    assert len(ids) == tokens, "the text is long enough"
    cache = model.cache(kv, shares=False)

    def take_in() -> Iterator[tuple[str, Sequence]]:
        """The prompt: says when to look, and at what."""
        with cache.open(ids) as sequence:
            start = 0
            while start < len(ids):
                chunk = ids[start : start + min(CHUNK, room(sequence))]
                start += len(chunk)
                model.run([(sequence, chunk)])
                if start == len(ids):
                    yield "before", sequence
                sequence.settle()
            yield "settled", sequence

    for _ in take_in():
        Memory.now(cache.arena)  # reading takes memory too
    ground, moments = Memory.now(cache.arena), {}
    for when, sequence in take_in():
        cache.check()
        books = {"account": sequence.nbytes.allocated, "slabs": cache.nbytes.allocated}
        moments[when] = books | Memory.now(cache.arena).above(ground)
    return {
        "spec": kv, "tokens": tokens, "weights": model.weights, "formula": model.spec(kv).nbytes(tokens).allocated,
        "page_a_lane": sum(len(group.lanes) * group.page_bytes for group in cache.spec.groups),
        "moments": moments, "ground": vars(ground), "left": Memory.now(cache.arena).above(ground),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, MiB; moments at which nothing has left are left out."""
    heads = ("formula", "account", "slabs", "arena", "grown", "anonymous", "grown - account", "a page a lane")
    out = ["| spec | when | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        leaves = row["moments"]["before"]["account"] != row["moments"]["settled"]["account"]
        for when, found in row["moments"].items():
            if when != "settled" and not leaves:
                continue
            figures = [f"{found[key] / MIB:.2f}" for key in ("account", "slabs", "arena", "resident", "anonymous")]
            apart = found["resident"] - found["account"]
            formula = "" if when == "before" else f"{row['formula'] / MIB:.2f}"
            share = f"{apart / MIB:+.2f} ({apart / found['account']:+.1%})"
            page = f"{row['page_a_lane'] / MIB:.2f}"
            out.append(f"| {row['spec']} | {when} | " + " | ".join([formula, *figures, share, page]) + " |")
    return "\n".join(out)


def main() -> None:
    """A process a spec, one after the other; prints the table, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kv", default=SPECS, help="specs, with | between them")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--one", action="store_true", help="measure one spec here, and print JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.kv, options.tokens, options.model, options.weights)))
        return
    rows = []
    for kv in options.kv.split("|"):
        shared = ["--tokens", str(options.tokens), "--model", options.model, "--weights", options.weights]
        done = subprocess.run(
            [sys.executable, __file__, "--one", "--kv", kv, *shared], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
        print(f"{kv}: {rows[-1]['moments']['settled']['resident'] / MIB:.2f} MiB", file=sys.stderr, flush=True)
    print(table(rows))
    left, arena = (max(row["left"][name] for row in rows) for name in ("resident", "arena"))
    print(f"MiB. After close: at most {left / MIB:+.2f} MiB above the ground, {arena:,} B in the cache's mapping.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
