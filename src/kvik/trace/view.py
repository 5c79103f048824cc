"""A trace for a terminal of 80 columns or more: a block a step, a table of all steps, and what was saved."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kvik.trace.recording import Frame, Trace
from kvik.trace.summary import rows, states
from kvik.trace.tokens import visible

BARS = 12  # rows whose weight is drawn; the weakest others are added up
BLOCKS = 10  # steps that are shown in full; of a longer text the first and last few
FIRST, LAST = 5, 3
LINES = 80  # steps in the table; of a longer text the first and last half
_LABEL = 12
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render(trace: Trace, console: Console, *, layer: int, head: int) -> None:
    """Prints a trace.

    Args:
        layer: a recorded one.
        head: a query head of it.
    """
    _say(console, _title(trace, layer, head))
    frames = trace.frames
    whole = len(frames) <= BLOCKS
    for frame in frames if whole else frames[:FIRST]:
        _block(trace, frame, console, layer, head)
    if not whole:
        _say(console, Text(f"\n… steps {FIRST + 1} to {len(frames) - LAST} are in the table below", style="dim"))
        for frame in frames[-LAST:]:
            _block(trace, frame, console, layer, head)
    console.print()
    narrow = console.width
    console.width = max(narrow, 80)  # a table's numbers are not cut, even if its lines then wrap
    console.print(_table(trace, layer, head, console.width))
    console.width = narrow
    console.print()
    for line in _closing(trace, layer, head):
        _say(console, line)


def _say(console: Console, text: Text | str) -> None:
    console.print(text, highlight=False, markup=False)


def _title(trace: Trace, layer: int, head: int) -> Text:
    lane = trace.lane(head)
    others = [str(other) for other in trace.sharing(lane) if other != head]
    shared = f", which it shares with {'head' if len(others) == 1 else 'heads'} {', '.join(others)}" if others else ""
    text = visible("".join(trace.texts[token] for token in trace.tokens))
    return Text.assemble(
        (trace.model, "bold"),
        f"  weights {trace.weights} · cache {trace.spec}\n",
        f"{_times(trace.layers, 'layer')}, each with {_times(trace.heads, 'query head')} over "
        f"{_times(trace.lanes, 'lane')} (KV heads)\n",
        f"looking at layer {layer}, head {head}: it reads lane {lane}{shared}\n",
        (f"{_cut(text, 60)}  {_times(len(trace.tokens), 'token')}", "dim"),
    )


def _block(trace: Trace, frame: Frame, console: Console, layer: int, head: int) -> None:
    look, lane = frame.looks[layer], trace.lane(head)
    count, held, width = len(frame.tokens), rows(look, lane), look.k.shape[2]
    at, room = frame.length - 1, min(console.width, 120) - _LABEL
    console.print()
    title = f"step {frame.number} of {len(trace.frames)} · {frame.phase}"
    console.print(Rule(Text(title, "bold"), align="left", style="dim"), width=min(console.width, 120))
    for label, line in (
        ("token" if count == 1 else "tokens", _tokens(trace, frame, room)),
        ("predicts", _predicts(trace, frame, room)),
        ("shapes", f"q {count}×{width} · Kᵀ {width}×{held} · V {held}×{look.v.shape[2]}"),
        (f"q {at}", _numbers(look.q[-1, head], room)),
        (f"Kᵀ col. {at}", _numbers(look.k[lane, -1], room)),
        (f"V row {at}", _numbers(look.v[lane, -1], room)),
    ):
        _say(console, _line(label, line))
    for number, line in enumerate(_weights(trace, frame, room, layer, head)):
        _say(console, _line("weights" if number == 0 else "", line))
    for label, line in _sums(trace, frame, layer, head, lane):
        _say(console, _line(label, line))


def _line(label: str, text: Text | str) -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "dim"), text)


def _tokens(trace: Trace, frame: Frame, room: int) -> Text:
    text = visible("".join(trace.texts[token] for token in frame.tokens))
    places = str(frame.start) if len(frame.tokens) == 1 else f"{frame.start}–{frame.length - 1}"
    left = room - len(places) - 2
    return Text.assemble(f"{places}  ", (_cut(text, left), "bold"))


def _predicts(trace: Trace, frame: Frame, room: int) -> Text:
    line = Text()
    for number, guess in enumerate(frame.guesses):
        word = visible(trace.texts[guess.token])
        piece = Text.assemble((word, "bold" if number == 0 else ""), (f" {_percent(guess.probability)}", "dim"), "   ")
        if number and cell_len(line.plain) + cell_len(piece.plain) - 3 > room:
            break
        line.append_text(piece)
    line.rstrip()
    return line


def _numbers(row: Tensor, room: int) -> str:
    """As many numbers of a row as fit, and how many more there are."""
    values, end = [f"{_figure(value):>8}" for value in row.tolist()], f"  … {len(row):,} in all"
    if len(values) * 8 <= room:
        return "".join(values)
    return "".join(values[: max((room - len(end)) // 8, 1)]) + end


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _weights(trace: Trace, frame: Frame, room: int, layer: int, head: int) -> Iterator[Text]:
    """A bar for each row that the last query sees, in the order of positions; of many the strongest."""
    look, lane = frame.looks[layer], trace.lane(head)
    weights, state = look.weights[-1, head].tolist(), states(look, lane)
    seen = [at for at, each in enumerate(state) if each == "seen"]
    drawn = sorted(sorted(seen, key=lambda at: -weights[at])[:BARS])
    words = {at: visible(trace.texts[trace.tokens[at]]) for at in drawn}
    wide, digits = min(max(map(cell_len, words.values())), 16), len(str(frame.length - 1))
    length = room - digits - wide - 11
    for at in drawn:
        style = "green" if at >= frame.start else "cyan"
        yield Text.assemble(
            f"{at:>{digits}} ", set_cell_size(_cut(words[at], wide), wide), f" {_percent(weights[at]):>7} ",
            (_bar(weights[at], length), style),
        )  # fmt: skip
    if rest := len(seen) - len(drawn):
        share = sum(weights[at] for at in seen) - sum(weights[at] for at in drawn)
        yield Text(f"{rest} more rows share {_percent(max(share, 0.0))}", style="dim")
    if len(seen) < len(state):
        hidden, gone = state.count("hidden"), state.count("gone")
        left = f"{gone} that the policy let go" if trace.hides == "every row" else f"{gone} gone with their pages"
        yield Text(f"not seen: {f'{hidden} hidden by the window, ' if hidden else ''}{left}", style="dim")


def _bar(share: float, length: int) -> str:
    eighths = round(share * length * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _sums(trace: Trace, frame: Frame, layer: int, head: int, lane: int) -> Iterator[tuple[str, str]]:
    look, new = frame.looks[layer], len(frame.tokens)
    held = int(look.held[lane].sum())
    yield "rows held", f"{held} a lane, {new} of them new" if held >= new else f"{held} a lane, of {new} new ones"
    size = frame.nbytes
    yield "bytes", f"{size.payload:,} payload + {size.overhead:,} overhead = {size.allocated:,} allocated"
    for label, what, mine, theirs in (
        ("computed", "row of k and v in this lane", frame.cached.rows[layer, lane], frame.recomputed.rows[layer, lane]),
        ("", "query-key pair of this head", frame.cached.pairs[layer, head], frame.recomputed.pairs[layer, head]),
    ):
        yield label, f"{_times(mine, what)} so far; {theirs:,} without a cache"
    same, plain = _apart(frame.same.largest), _apart(frame.plain.largest)
    yield "difference", f"{same} from recomputing the whole text"
    yield "", f"{plain} from recomputing it with {_exact(trace)}"


def _table(trace: Trace, layer: int, head: int, width: int) -> Table:
    """All steps, a line each. Numbers are never cut: the words take what they leave of the width."""
    heads = ("step", "token", "predicts", "rows\nheld", "bytes\nallocated", "rows computed\nwith/without",
             "pairs\nwith/without", "differ-\nence")  # fmt: skip
    lines = [_cells(trace, frame, layer, head) for frame in trace.frames]
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], ["…"] + [""] * (len(heads) - 1), *lines[-LINES // 2 :]]
    sizes = [max(map(cell_len, [*name.split("\n"), *column])) for name, *column in zip(heads, *lines, strict=True)]
    words = max((width - sum(sizes) + sizes[1] + sizes[2] - len(sizes) + 1) // 2, 4)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for number, name in enumerate(heads):
        left = number in (1, 2)
        table.add_column(_cut(name, words) if left else name, justify="left" if left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(_cut(each, words) if number in (1, 2) else each) for number, each in enumerate(line)))
    return table


def _cells(trace: Trace, frame: Frame, layer: int, head: int) -> list[str]:
    lane, words = trace.lane(head), [visible(trace.texts[token]) for token in frame.tokens]
    more = "" if len(words) == 1 else f" +{len(words) - 1}"
    return [
        str(frame.number),
        words[0] + more,
        visible(trace.texts[frame.guesses[0].token]),
        f"{int(frame.looks[layer].held[lane].sum()):,}",
        f"{frame.nbytes.allocated:,}",
        f"{frame.cached.rows[layer, lane]:,}/{frame.recomputed.rows[layer, lane]:,}",
        f"{frame.cached.pairs[layer, head]:,}/{frame.recomputed.pairs[layer, head]:,}",
        _apart(frame.same.largest),
    ]


def _closing(trace: Trace, layer: int, head: int) -> Iterator[str]:
    lane, last = trace.lane(head), trace.frames[-1]
    mine, theirs = last.cached, last.recomputed
    yield (
        f"Each lane computed {_times(mine.rows[layer, lane], 'row of k and v')} instead of "
        f"{theirs.rows[layer, lane]:,}, each head {_times(mine.pairs[layer, head], 'query-key pair')} instead of "
        f"{theirs.pairs[layer, head]:,}: that is what {last.nbytes.allocated:,} B bought."
    )
    worst = max(frame.same.largest for frame in trace.frames)
    cost = max(frame.plain.largest for frame in trace.frames)
    verdict = "bit for bit what" if worst == 0 else f"NOT what (they differ by {_apart(worst)})"
    if last.nbytes.overhead > last.nbytes.payload:
        yield (
            f"Rows lie in pages of {trace.page_size}, and a page is held whole: so short a text needs "
            f"{last.nbytes.payload:,} B of them."
        )
    yield (
        f"Every step gave {verdict} computing all of it again gives; with {_exact(trace)}, logits and attention "
        f"outputs would differ by up to {_apart(cost)}."
    )
    if trace.hides == "every row" and bool(last.looks[layer].held.all()):
        yield (
            "The policy let no row of this layer go. --prefill says how many tokens are the prompt, at whose end it "
            f"may choose; what the spec's sinks and recent say stays in any case, and so do pages of {trace.page_size} "
            "that are not full."
        )
    if sink(trace, layer, head):
        yield (
            "This head gives most of its weight to the first token, as many do: an attention sink, where weight goes "
            "that is not needed elsewhere."
        )


def sink(trace: Trace, layer: int, head: int) -> bool:
    """Whether a head's queries, from the third token on, give most of their weight to the first."""
    looks = [frame.looks[layer] for frame in trace.frames if frame.length >= 3]
    shares = [float(look.weights[-1, head, 0]) for look in looks]
    return bool(shares) and sum(shares) / len(shares) > 0.5


def _exact(trace: Trace) -> str:
    """What the recomputation had that costs nothing of the model."""
    return f"f32 rows and {trace.hides}" if trace.hides else "f32 rows"


def _times(count: int, what: str) -> str:
    """`1 row of k and v`, `2 rows of k and v`."""
    first, *rest = what.split(" of ")
    return " of ".join([f"{count:,} {first}" + ("" if count == 1 else "s"), *rest])


def _cut(text: str, width: int) -> str:
    """At most so many cells wide."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _apart(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.2g}"
