"""Findings as tables: for a terminal, as JSON, and as markdown between markers of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.errors import UsageError
from kvik.hf.conformance.caches import Contender
from kvik.hf.conformance.cases import Case
from kvik.hf.conformance.verdicts import Finding, Verdict

WORDS = {Verdict.HOLDS: "holds", Verdict.BROKEN: "BROKEN", Verdict.CRASHED: "ERROR", Verdict.UNFIT: "–"}
COLORS = {Verdict.HOLDS: "green", Verdict.BROKEN: "bold red", Verdict.CRASHED: "red", Verdict.UNFIT: "dim"}
BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


def render(console: Console, contenders: Sequence[Contender], cases: Sequence[Case], found: Sequence[Finding]) -> None:
    """A table of cases and caches, then what was seen wherever something is wrong or does not apply."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("case", no_wrap=True)
    names = [contender.name for contender in contenders]
    short = sum(max(len(name), 6) + 1 for name in names) + 25 > console.width
    heads = [str(number) for number in range(1, len(names) + 1)] if short else names
    for head in heads:
        table.add_column(head, no_wrap=True)
    by = {(finding.case, finding.cache): finding for finding in found}
    for case in cases:
        row = [by[case.name, contender.name].verdict for contender in contenders]
        table.add_row(case.name, *(Text(WORDS[verdict], COLORS[verdict]) for verdict in row))
    table.add_row(Text("seconds", "dim"), *(Text(f"{seconds(found, each):.0f}", "dim") for each in contenders))
    console.print(table)
    for head, contender in zip(heads, contenders, strict=True):
        title = f"{head}: {contender.name}" if short else contender.name
        console.print(Text.assemble("\n", (title, "bold"), (f"  {contender.how}", "dim")))
        console.print(Text(f"  {tally(found, contender)}"))
        for verdict, seen, where in notable(found, contender):
            word = (f"  {verdict.value}: ", COLORS[verdict])
            console.print(Text.assemble(word, (", ".join(where), "bold"), f": {seen}"))


def seconds(found: Sequence[Finding], contender: Contender) -> float:
    """How long one cache's cases took together."""
    return sum(finding.seconds for finding in found if finding.cache == contender.name)


def tally(found: Sequence[Finding], contender: Contender) -> str:
    """How many of one cache's cases came to what, in words."""
    mine = [finding.verdict for finding in found if finding.cache == contender.name]
    return ", ".join(f"{mine.count(verdict)} {verdict.value}" for verdict in Verdict if verdict in mine)


def notable(found: Sequence[Finding], contender: Contender) -> list[tuple[Verdict, str, list[str]]]:
    """(Verdict, what was seen, in which cases) wherever something is wrong or does not apply, the worst first."""
    same: dict[tuple[Verdict, str], list[str]] = {}
    for finding in found:
        if finding.cache == contender.name and finding.verdict is not Verdict.HOLDS:
            same.setdefault((finding.verdict, finding.seen), []).append(finding.case)
    order = list(Verdict)
    return sorted(((*key, names) for key, names in same.items()), key=lambda each: order.index(each[0]))


def as_json(
    contenders: Sequence[Contender], cases: Sequence[Case], found: Sequence[Finding], versions: dict[str, str]
) -> dict[str, object]:
    """All of it as plain data."""
    return {
        "versions": versions,
        "caches": {contender.name: {"how": contender.how, "lossy": contender.lossy} for contender in contenders},
        "cases": {case.name: case.law for case in cases},
        "findings": [{**asdict(finding), "seconds": round(finding.seconds, 3)} for finding in found],
    }


def markdown(
    contenders: Sequence[Contender], cases: Sequence[Case], found: Sequence[Finding], versions: dict[str, str]
) -> str:
    """The same tables for a file."""
    by = {(finding.case, finding.cache): finding for finding in found}
    lines = [", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    lines += ["| case | what must hold | " + " | ".join(f"`{each.name}`" for each in contenders) + " |"]
    lines += ["|---" * (2 + len(contenders)) + "|"]
    for case in cases:
        row = [by[case.name, each.name].verdict for each in contenders]
        cells = [f"**{verdict.value}**" if verdict.bad else WORDS[verdict] for verdict in row]
        lines.append(f"| {case.name} | {case.law} | {' | '.join(cells)} |")
    for contender in contenders:
        lines += ["", f"**`{contender.name}`** (`{contender.how}`): {tally(found, contender)}.", ""]
        for verdict, seen, names in notable(found, contender):
            lines.append(f"- {verdict.value}: {', '.join(names)}: {seen}")
    return "\n".join(lines)


def between(text: str, block: str) -> str:
    """A file's text with a new block between its markers.

    Raises:
        UsageError: it has no markers.
    """
    if BEGIN not in text or END not in text:
        raise UsageError(f"--write: the file has no lines {BEGIN} and {END}; put them where the table goes")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END, 1)[1]}"
