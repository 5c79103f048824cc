"""How far each KV head looks, as a table for a terminal of 80 columns or a file, and the spec that follows."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from kvik.eval.heads import Heads
from kvik.eval.view import lines
from kvik.eval.words import share
from kvik.units import format_bytes

FAR, NEAR = "●", "○"
GAP = 3  # cells between two blocks


def render_heads(found: Heads, console: Console) -> None:
    """Prints a cell for each KV head, what they mean, and the spec: the last line, uncut however long it is.

    Args:
        found: measured.
        console: where to.
    """
    where = found.environment
    device = where.cpu if where.device == "cpu" else where.device
    console.print(
        Text.assemble((found.model, "bold"), f"  weights {found.weights} · {found.tokens:,} tokens of {found.text}")
    )
    console.print(Text(f"{device}, {where.threads} threads · torch {where.torch}", "dim"))
    console.print()
    for line in grid(found, console.width):
        console.print(line)
    console.print()
    console.print(lines(facts(found)))
    console.print()
    console.print(found.spec, soft_wrap=True, highlight=False, markup=False)


def grid(found: Heads, width: int) -> Iterator[Text]:
    """Layers below one another, as many blocks of them side by side as the width has room for. A head is its score in
    hundredths and a mark; a mark alone where a layer has too many heads for that."""
    most = max(map(len, found.scores))
    figures = 6 + 4 * most <= width
    cell = 4 if figures else 1
    block = 6 + cell * most
    layers = len(found.scores)
    blocks = max(min((width + GAP) // (block + GAP), layers), 1)
    high = -(-layers // blocks)
    blocks = -(-layers // high)
    names = "".join(f"{head:>3} " for head in range(most)) if figures else f"heads 0 to {most - 1}"
    title = Text(f"layer {names}".ljust(block), "dim")
    yield Text(" " * GAP).join([title] * blocks)
    for line in range(high):
        yield Text(" " * GAP).join(_layer(found, layer, block, figures) for layer in range(line, layers, high))


def _layer(found: Heads, layer: int, block: int, figures: bool) -> Text:
    text = Text(f"{layer:>5} ", "dim")
    for head, score in enumerate(found.scores[layer]):
        far = (layer, head) in found.far
        number = f"{100 * score:>3.0f}" if figures else ""
        text.append(f"{number}{FAR if far else NEAR}", "bold not dim" if far else "dim")
    text.append(" " * (block - text.cell_len))
    return text


def facts(found: Heads) -> Iterator[tuple[str, str]]:
    """What the table means: (about what, in a line or two)."""
    near, count = found.spec.partition(";")[0], len(found.lanes)
    yield "score", "how far back a KV head looks, in hundredths: 0 at itself alone, 100 at the far end alone"
    if found.far:
        yield FAR, f"{len(found.far)} of {count} keep every row: those that score {found.least_far:.3f} or more"
    if len(found.far) < count:
        yield NEAR, f"{count - len(found.far)} keep what '{near}' says"
    sizes = f"{format_bytes(found.held.allocated)} instead of {format_bytes(found.every.allocated)}"
    yield "bytes", f"{sizes} for {found.tokens:,} tokens, {share(found.share)}"
    yield "spec", "the line below, for --kv; 'kvik eval SPEC' measures what it costs"
