"""`kvik translate`: lines of text through a model that reads a source, and what its kept rows save."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.common import (
    INTERRUPTED,
    DeviceOption,
    JsonOption,
    KvOption,
    MemoryOption,
    WeightsOption,
    app,
    budget,
    check_spec,
    load_model,
    stderr,
    stdin,
)  # fmt: skip
from kvik.cli.train import stoppable
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.engine.translation import Outcome
    from kvik.models.model import Model

MOST_BEAMS, ROUNDS = 8, 5


@app.command()
def translate(
    text: Annotated[str, typer.Argument(help="What to translate, a sentence a line; - reads it from standard input.")],
    to: Annotated[
        str | None, typer.Option(help="zh, ko, both, or what stands between >> and << for a model of many languages.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="dates, or an encoder-decoder: a folder, or a hub id.")
    ] = "dates",
    kv: KvOption = "bf16",
    beams: Annotated[int, typer.Option(help=f"Beams of a search, 1 to {MOST_BEAMS}; 1 takes likeliest tokens.")] = 1,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens of each line at the most.")] = None,
    no_cross_cache: Annotated[
        bool, typer.Option("--no-cross-cache", help="Compute the source's keys and values again at every step.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help=f"Run both ways side by side, {ROUNDS} times each; medians.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Translate lines of text; each is read once, and its rows are kept.

    The built-in model, dates, was trained by 'kvik train dates' on English sentences about dates, times, prices, counts
    and numbers, to Chinese and Korean. It can't know what else it is given, and answers with something all the same.
    """
    room = budget(memory)
    check_spec(kv, allow_none=False)
    _check(beams, max_tokens, no_cross_cache, compare)
    lines = [line.strip() for line in (stdin().read() if text == "-" else text).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError("there is no text to translate; give a sentence, or - to read lines from standard input")
    loaded = load_model(model, weights, device, reads=True)
    from kvik.engine.sources import asked, limit
    from kvik.engine.translation import translate as kept
    from kvik.engine.translation import translate_again as again

    sources = asked(loaded, lines, to)
    options: dict[str, Any] = dict(kv=kv, memory=room, max_tokens=limit(loaded, max_tokens))
    ids = [source.ids for source in sources]
    found: dict[bool, list[Outcome]] = {True: [], False: []}
    with stoppable() as stopping:
        for _ in range(ROUNDS if compare else 1):
            if not no_cross_cache:
                found[True].append(kept(loaded, ids, count=beams, stopping=stopping, **options))
            if no_cross_cache or compare:
                found[False].append(again(loaded, ids, stopping=stopping, **options))
            if stopping():
                break
        stopped = stopping()
    first = (found[True] or found[False])[0]
    assert loaded.tokenizer is not None, "text needs one"
    texts = [loaded.tokenizer.decode(each) for each in first.texts]
    runs = [_facts(kept, outcomes) for kept, outcomes in found.items() if outcomes]
    if as_json:
        answers = [
            {
                "text": source.text, "to": source.to, "translation": text, "source_tokens": len(source.ids),
                "token_ids": list(got), "ended": bool(got) and got[-1] in loaded.config.eos_ids,
            }
            for source, text, got in zip(sources, texts, first.texts, strict=True)
        ]  # fmt: skip
        facts = {
            "model": loaded.config.name, "spec": kv, "weights": loaded.weights, "beams": beams,
            "lines": len(lines), "translations": answers, "runs": runs, "interrupted": stopped,
        }  # fmt: skip
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        for line in texts:
            print(line)
        _show(loaded, runs, sum(len(each.ids) for each in sources), len(sources), kv, model)
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _check(beams: int, max_tokens: int | None, off: bool, compare: bool) -> None:
    """Complains before a model is loaded."""
    if not 1 <= beams <= MOST_BEAMS:
        raise UsageError(f"--beams {beams}: use 1 to {MOST_BEAMS}")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: use at least 1")
    if off and compare:
        raise UsageError("--compare runs with the cross-attention cache and without; leave --no-cross-cache out")
    if beams > 1 and (off or compare):
        raise UsageError(f"--beams {beams} reads kept rows only; use --beams 1 with --compare or --no-cross-cache")


def _facts(kept: bool, outcomes: list[Outcome]) -> dict[str, Any]:
    """One way of running, by the medians of its rounds."""
    one = outcomes[0]
    return {
        "cross_cache": kept,
        "encoder_runs": one.encoded,
        "source_rows_computed": one.rows,
        "held_bytes": one.held,
        "new_tokens": sum(map(len, one.texts)),
        "seconds": round(statistics.median(each.seconds for each in outcomes), 5),
        "source_seconds": round(statistics.median(each.source_s for each in outcomes), 5),
        "rounds": len(outcomes),
    }


def _show(model: Model, runs: list[dict[str, Any]], rows: int, sources: int, kv: str, name: str) -> None:
    """What happened, on stderr."""
    lines = [
        f"{sources} source{'s' * (sources > 1)} of {rows} tokens in all, {runs[0]['new_tokens']} new tokens · "
        f"cache {kv}, weights {model.weights}"
    ]
    lines.append(f"{'cross-attention':18}{'encoder runs':>13}{'source rows computed':>22}{'held':>12}{'time':>11}")
    for run in runs:
        held = "-" if run["held_bytes"] is None else f"{run['held_bytes']:,} B"
        way = "rows kept" if run["cross_cache"] else "computed again"
        lines.append(
            f"{way:18}{run['encoder_runs']:>13}{run['source_rows_computed']:>22,}{held:>12}"
            f"{run['seconds'] * 1000:>8.1f} ms"
        )
    if name == "dates":
        lines.append("the model knows dates, times, prices, counts and numbers; 'kvik train dates' made it")
    stderr().print("\n" + "\n".join(lines), style="dim", highlight=False, markup=False, soft_wrap=True)
