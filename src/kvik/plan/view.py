"""A plan and the list of well-known models as tables for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.errors import SpecError
from kvik.plan.arithmetic import Plan
from kvik.plan.formula import stays
from kvik.units import format_bytes, format_count


def render_plan(plan: Plan, console: Console) -> None:
    """Prints one plan: sizes, formula, what fits, notes."""
    console.print(_title(plan))
    console.print()
    console.print(_sizes(plan))
    console.print()
    console.print(_facts(plan))


def render_list(plans: Sequence[Plan], console: Console) -> None:
    """Prints the well-known models, one a line, and what the columns mean."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("model", no_wrap=True)
    for head in ("param.", "weights", "a token", "context", "in full", "outweighs"):
        table.add_column(head, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(*_row(plan))
    console.print(table)
    kinds = " ".join(sorted({p.kv for p in plans})), "/".join(sorted({p.weights.name for p in plans}))
    console.print()
    for line in (
        f"cache {kinds[0]}, weights {kinds[1]}, one sequence; 1 KiB is 1024 bytes",
        "a token    what a token adds to the cache; a→b: b once the windows are full",
        "in full    the cache at full context, and what cross-attention keeps",
        "outweighs  tokens from which the cache is larger than the weights",
    ):
        console.print(Text(line, style="dim"))


def render_refusals(refused: Mapping[str, SpecError], console: Console) -> None:
    """Prints which well-known models can't have a spec, one line for each reason."""
    for reason in dict.fromkeys(map(str, refused.values())):
        names = [name for name, error in refused.items() if str(error) == reason]
        console.print(Text(f"not {', '.join(names)}: {reason}", style="dim"), soft_wrap=True)


def _row(plan: Plan) -> tuple[str, ...]:
    shape = plan.shape
    early, late = plan.per_token.payload, plan.per_token_later.payload
    if early == 0:
        token = "0 B"
    elif early == late:
        token = format_bytes(early)
    else:
        token = f"{early / 1024:.0f}→{late / 1024:.0f} KiB"
    return (
        shape.name,
        "?" if shape.parameters is None else format_count(shape.parameters),
        "?" if plan.weight_bytes is None else format_bytes(plan.weight_bytes),
        token,
        f"{plan.tokens:,}",
        format_bytes(plan.per_sequence.payload),
        "never" if plan.outweighs is None else format_count(plan.outweighs),
    )


def _title(plan: Plan) -> Text:
    shape = plan.shape
    counted = "parameters unknown" if shape.parameters is None else f"{shape.parameters:,} parameters"
    parts = []
    if shape.layers:
        layer = shape.layers[0]
        names = [name for name, _ in layer.streams]
        shared = f"{layer.heads} KV of {layer.streams[0][1]}"
        if layer.use != "attend":
            shared = f"rows of {' and '.join(names)}"
        elif names[0] != "k":
            shared = "one latent"
        parts += [f"{len(shape.layers)} layers", f"{shape.query_heads} heads, {shared}"]
    parts += [f"d_model {shape.d_model}"] + [f"context {shape.context:,}"] * (shape.context is not None)
    return Text.assemble((shape.name, "bold"), f"  {counted}\n", (" · ".join(parts), "dim"))


def _sizes(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("")
    for head in ("binary", "decimal", "bytes"):
        table.add_column(head, justify="right", no_wrap=True)

    def add(label: str, count: int, style: str = "") -> None:
        table.add_row(
            label, format_bytes(count), format_bytes(count, decimal=True, digits=2), f"{count:,}", style=style
        )

    if plan.weight_bytes is None:
        table.add_row(f"weights, {plan.weights.name}", "unknown", "", "")
    else:
        add(f"weights, {plan.weights.name}", plan.weight_bytes)
    if plan.spec is None:
        add("cache, at any length", 0, "bold")
        return table
    kv = plan.kv if len(plan.kv) < 12 else "as below"
    add(f"cache, {kv}: a token", plan.per_token.payload)
    if plan.per_token != plan.per_token_later:
        add("  a token, once rows leave" if plan.policies else "  a token, windows full", plan.per_token_later.payload)
    if plan.cross_spec:
        add(f"  {plan.shape.source:,} source rows, once", plan.cross.payload)
    if plan.batch > 1:
        add(f"  a sequence of {plan.tokens:,}", plan.per_sequence.payload)
    add(f"  {_scope(plan)}", plan.total.payload, "bold")
    add("  + scales, tables, open pages", plan.total.overhead)
    add("  = allocated", plan.total.allocated)
    if plan.policies and plan.peak > plan.total.allocated:
        add("  at most, on the way there", plan.peak)
    return table


def _scope(plan: Plan) -> str:
    return f"{plan.batch:,} × {plan.tokens:,} tokens" if plan.batch > 1 else f"a sequence of {plan.tokens:,}"


def _facts(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    _add_lines(table, "formula", _formula(plan))
    if len(plan.kv) >= 12:
        table.add_row("spec", plan.kv)
    for policy in plan.policies:
        table.add_row("rows", f"{policy}: {stays(policy, plan.tokens)}")
    if plan.textbook:
        table.add_row("textbook", f"{plan.textbook.text} = {plan.textbook.payload:,} B")
        table.add_row("", _verdict(plan))
    if plan.weight_bytes is not None and plan.weights.name != "file":
        table.add_row("weights", f"{plan.shape.parameters:,} · {plan.weights.formula}")
    if plan.spec and plan.weight_bytes is not None:
        each = " a sequence" if plan.batch > 1 else ""
        table.add_row("outweighs", _outweighs(plan, each))
    if plan.memory is not None:
        _add_lines(table, "memory", _fit(plan))
    _add_lines(table, "note", plan.notes)
    return table


def _add_lines(table: Table, label: str, lines: Iterable[str | Text]) -> None:
    for line in lines:
        table.add_row(label, line)
        label = ""


def _formula(plan: Plan) -> list[str]:
    if not plan.terms:
        return ["0 B: there is nothing to keep"]
    lines = [f"{term.text} = {term.payload:,} B" for term in plan.terms]
    if len(lines) > 1:
        lines = [lines[0], *(f"+ {line}" for line in lines[1:]), f"= {plan.total.payload:,} B"]
    return lines


def _verdict(plan: Plan) -> Text:
    ratio = plan.textbook_ratio or 1.0
    why = "; ".join(plan.reasons)
    if abs(ratio - 1) < 0.005:
        return Text(
            "right here" + (f", by accident: {why}" if why else ": every query head has its own k and v"), "green"
        )
    factor = max(ratio, 1 / ratio)
    size = f"{factor:.1f}×" if factor >= 1.05 else f"{abs(ratio - 1):.1%}"
    return Text(f"{size} too {'much' if ratio > 1 else 'little'}: {why}", "yellow")


def _outweighs(plan: Plan, each: str) -> str:
    if plan.outweighs is None:
        return f"never: the {'spec bounds' if plan.policies else 'windows bound'} the cache below the weights"
    return f"the weights from {plan.outweighs:,} tokens{each}" + ", on the way there" * bool(plan.policies)


def _fit(plan: Plan) -> list[str | Text]:
    fit = plan.fit
    if fit is None:
        return ["what fits can't be said: the weights are unknown"]
    if fit.memory < (plan.weight_bytes or 0):
        short = (plan.weight_bytes or 0) - fit.memory
        return [Text(f"{_memory(fit.memory)} can't hold the weights: {format_bytes(short)} short", "red")]
    first = f"{_memory(fit.memory)}, of which the weights leave {format_bytes(fit.room)}: "
    verdict = Text(first + ("this fits" if fit.fits else "this does not fit"), "green" if fit.fits else "red")
    if plan.spec is None:
        return [verdict]
    longest = "any" if fit.tokens is None else f"{fit.tokens:,} tokens" if fit.tokens else "none"
    turns = ", prompts one after another" * bool(plan.policies)
    plural = "sequence" if plan.batch == 1 else "sequences"
    return [
        verdict,
        f"largest batch at {plan.tokens:,} tokens{turns}: {f'{fit.batch:,}' if fit.batch else 'none'}",
        f"longest context with {plan.batch:,} {plural}: {longest}",
    ]


def _memory(count: int) -> str:
    """A size in the kind of unit that it was most likely given in."""
    return format_bytes(count, decimal=count % 2**20 != 0 and count % 10**6 == 0)
