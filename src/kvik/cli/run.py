"""`kvik run` and `kvik chat`: text through the cache, and what it cost."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.common import (
    INTERRUPTED,
    KV_HELP,
    DeviceOption,
    JsonOption,
    KvOption,
    MaxTokensOption,
    MemoryOption,
    ModelOption,
    SeedOption,
    ShareOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    WeightsOption,
    app,
    budget,
    check_share,
    check_spec,
    load_model,
    stderr,
    stdin,
)  # fmt: skip
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.cache.spec import Spec
    from kvik.engine.generation import Generation
    from kvik.engine.sampling import Sampling
    from kvik.models.model import Model


@app.command()
def run(
    prompt: Annotated[
        str, typer.Argument(help="What to say to the model, or to translate; - reads it from standard input.")
    ],
    model: ModelOption = "smollm2",
    kv: Annotated[str, typer.Option("--kv", help=f"{KV_HELP}; tuned; none = recompute all.")] = "bf16",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    share: ShareOption = None,
    memory: MemoryOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    stop: StopOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as the beginning of the text, without a chat format.")
    ] = False,
    backend: Annotated[
        str, typer.Option(help="kvik's own networks, or transformers': for architectures that kvik has none of.")
    ] = "kvik",
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt through the cache, and say what it cost."""
    _check_backend(backend, weights, share, device)
    room = budget(memory)
    sampling = _sampling(temperature, top_p, top_k, seed, max_tokens, stop)
    check_spec(kv, allow_none=True)
    check_share(share)
    if kv == "none" and memory is not None:
        raise UsageError("--kv none keeps no cache, so --memory has nothing to bound; leave one of the two out")
    text = stdin().read() if prompt == "-" else prompt
    loaded = load_model(model, weights, device, share, reads=True) if backend == "kvik" else _borrowed(model)
    from kvik.engine.generation import Generation, ask, opened

    request = ask(loaded, text, raw=raw, max_tokens=max_tokens, stop=tuple(stop or ()), sampling=sampling)
    if kv == "none":
        generation = Generation(loaded, request, None)
        spec = None
        _answer(generation, quiet=as_json)
    else:
        spec = loaded.spec(kv)
        cache = loaded.cache(kv, memory=room, shares=False)
        with opened(loaded, cache, request) as sequence:
            generation = Generation(loaded, request, sequence)
            _answer(generation, quiet=as_json)
            generation.nbytes = cache.nbytes  # one sequence owns it all: slabs and all
    facts = _facts(loaded, generation, spec, 0 if spec is None else len(sequence)) | {"share": share}
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        _show_facts(facts, loaded, spec)
    if generation.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


@app.command()
def chat(
    model: ModelOption = "smollm2",
    kv: KvOption = "bf16",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk over many turns; each shows how much was known. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    from kvik.chat import Chat

    room = budget(memory)
    sampling = _sampling(temperature, top_p, top_k, seed, max_tokens, stop)
    check_spec(kv, allow_none=False)
    stdin()
    loaded = load_model(model, weights, device)
    cache = loaded.cache(kv, memory=room)
    Chat(loaded, cache, sampling, max_tokens, tuple(stop or ())).loop(stderr(), as_json=as_json)


def _check_backend(backend: str, weights: str, share: str | None, device: str) -> None:
    """Complains about options that transformers' models don't have here."""
    if backend not in ("kvik", "transformers"):
        raise UsageError(f"--backend {backend!r}: use kvik or transformers")
    if backend == "transformers" and (weights != "auto" or share is not None or device != "cpu"):
        raise UsageError(
            "--backend transformers runs a model as its files have it, on the CPU; leave out --weights, "
            "--share and --device"
        )


def _borrowed(model: str) -> Model:
    """A model that transformers runs."""
    from transformers.utils import logging

    from kvik.hf.borrowed import borrowed

    logging.disable_progress_bar()
    return borrowed(model)


def _sampling(
    temperature: float, top_p: float, top_k: int, seed: int | None, max_tokens: int | None, stop: list[str] | None
) -> Sampling:
    """Checks everything about the answer before a model is loaded."""
    from kvik.engine.request import Request
    from kvik.engine.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    sampling = sampling if seed is None else replace(sampling, seed=seed)
    return Request([0], max_tokens, tuple(stop or ()), sampling).sampling


def _answer(generation: Generation, *, quiet: bool) -> None:
    """Streams the text to stdout; Ctrl-C ends it between two tokens."""
    from kvik.chat import interruptible

    try:
        with interruptible() as watch:
            for piece in watch(generation):
                if not quiet:
                    print(piece, end="", flush=True)
    finally:
        if not quiet and generation.token_ids:
            print(flush=True)


def _facts(model: Model, generation: Generation, spec: Spec | None, kept: int) -> dict[str, object]:
    from kvik.eval.caches import rows_held

    held, source = generation.nbytes, len(generation.request.source or ())
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "prompt_tokens": len(generation.request.prompt),
        "source_tokens": source,
        "cached_tokens": generation.cached_tokens,
        "new_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "note": generation.note,
        "ttft_s": round(generation.ttft_s, 4),
        "tokens_per_s": round(generation.tokens_per_s, 2),
        "kv_tokens": kept,
        "kv_rows": 0 if spec is None else round(rows_held(spec, kept, held.payload), 2),
        "kv_bytes": held.payload,
        "kv_bytes_formula": 0
        if spec is None
        else spec.nbytes(kept, prompt=len(generation.request.prompt), source=source).payload,
        "kv_overhead_bytes": held.overhead,
        "kv_allocated_bytes": held.allocated,
        "spec": "none" if spec is None else str(spec),
        "weights": model.weights,
        "weights_bytes": model.nbytes,
        "model": model.config.name,
        "seed": generation.request.sampling.seed if generation.request.sampling.temperature else None,
    }


def _show_facts(facts: dict[str, Any], model: Model, spec: Spec | None) -> None:
    from kvik.units import format_bytes

    console = stderr()
    source, begun = facts["source_tokens"], facts["prompt_tokens"]
    read = f"{source} source" if source else f"{begun} prompt"
    lines = [
        f"{read} + {facts['new_tokens']} new tokens ({facts['finish_reason']}) · "
        f"first after {facts['ttft_s']:.2f} s · then {facts['tokens_per_s']:.1f} tokens/s"
    ]
    if spec is None:
        lines.append("cache none: every step computed every token's keys and values again")
    else:
        rows = f"{facts['kv_tokens']:,} tokens"
        if facts["kv_rows"] < facts["kv_tokens"]:
            rows = f"{facts['kv_rows']:,.0f} of {facts['kv_tokens']:,} rows a head"
        rows += f", {source} rows of the source" if source else ""
        lines.append(
            f"cache {spec}: {facts['kv_bytes']:,} B payload ({rows}) "
            f"+ {facts['kv_overhead_bytes']:,} B overhead "
            f"= {facts['kv_allocated_bytes']:,} B"
        )
    lines.append(f"weights {facts['weights']}: {format_bytes(model.nbytes)}")
    if facts["share"] is not None:
        lines.append(
            f"share {facts['share']}: another model than its weights were trained for; see 'kvik eval --share'"
        )
    if facts["note"]:
        lines.append(facts["note"])
    if facts["seed"] is not None:
        lines.append(f"seed {facts['seed']}")
    console.print("\n" + "\n".join(lines), style="dim", highlight=False, markup=False)
