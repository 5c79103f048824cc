"""What a cache says of itself."""

from __future__ import annotations

from kvik.hf.batch import Batch
from kvik.hf.finding import Found
from kvik.units import format_bytes


def describe(found: Found, batch: Batch) -> str:
    """What is kept, where attention reads it and why, and what it takes."""
    cache, keeping = batch.cache, [shape for shape in found.layers if shape.heads]
    lines = [f"spec       {cache.spec}"]
    way = "over pages, as they are stored" if found.direct else f"over decoded rows: {found.why}"
    lines.append(f"attention  {way}")
    windows = sorted({shape.window for shape in keeping if shape.window is not None})
    windowed = sum(shape.window is not None for shape in keeping)
    seen = f", {windowed} of them with a window of {', '.join(map(str, windows))}" if windowed else ""
    lines.append(f"layers     {len(keeping)} of {len(found.layers)} keep rows{seen}")
    if found.sources:
        tables = [next(table for table in s.tables if table.group.source) for s in batch.sequences]
        each = {int(kept.pages[0, 0]): int(kept.counts[0]) for table in tables if (kept := table.kept) is not None}
        lines.append(f"sources    {len(each)} of {sum(each.values())} rows in all, each once for all that read it")
    held, padding = int(batch.real.sum()), int((~batch.real).sum())
    lines.append(
        f"batch      {len(batch.sequences)} rows, {held} tokens; {padding} places of padding, which take nothing"
    )
    size = cache.nbytes
    lines.append(
        f"bytes      {format_bytes(size.payload + size.overhead)}: {size.payload} of rows, {size.overhead} around them"
    )
    dense = sum(sum(width for _, width in shape.streams) * shape.heads for shape in keeping) * found.dtype.itemsize
    lines.append(f"a dense cache of this batch would take {format_bytes(dense * batch.real.size)}")
    return "\n".join(lines)
