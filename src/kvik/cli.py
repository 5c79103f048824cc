"""The command line: `kvik run`, `kvik chat`, `kvik plan`. Answers and facts asked for go to stdout, all else to stderr.

Exit codes: 0 done, 2 the input can't be used (one line on stderr says why), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kvik.errors import KvikError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from kvik.cache.spec import Spec
    from kvik.engine.generation import Generation
    from kvik.engine.sampling import Sampling
    from kvik.models.model import Model

INTERRUPTED = 130

app = typer.Typer(
    name="kvik",
    help="A KV cache for transformers: run a model through it, or plan what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a safetensors folder, a .gguf file, or a hub id.")
]
KvOption = Annotated[
    str, typer.Option("--kv", help="What the cache keeps: bf16, int8, k8v4, int4+window:1024,sinks:4 …")
]
WeightsOption = Annotated[str, typer.Option("--weights", help="How weights are held: auto, f32, bf16, int8 or int4.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", help="Budget of the cache, such as 64MiB.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more random.")]
TopPOption = Annotated[float, typer.Option(help="Only the likeliest tokens that together have this probability.")]
TopKOption = Annotated[int, typer.Option(help="Only so many of the likeliest tokens; 0 = all.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes random choices repeatable.")]
MaxTokensOption = Annotated[
    int | None, typer.Option(help="New tokens at the most; by default up to the model's context.")
]
StopOption = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; can be given several times.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads it from standard input.")],
    model: ModelOption = "smollm2",
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            help="What the cache keeps: bf16, int8, k8v4, int4+window:1024,sinks:4 …; none = recompute everything.",
        ),
    ] = "bf16",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
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
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt through the cache, and say what it cost."""
    budget = _budget(memory)
    sampling = _sampling(temperature, top_p, top_k, seed, max_tokens, stop)
    _check_spec(kv, allow_none=True)
    if kv == "none" and memory is not None:
        raise UsageError("--kv none keeps no cache, so --memory has nothing to bound; leave one of the two out")
    text = _stdin().read() if prompt == "-" else prompt
    loaded = _load(model, weights, device)
    from kvik.engine.generation import Generation, Request, encode_prompt

    request = Request(encode_prompt(loaded, text, raw=raw), max_tokens, tuple(stop or ()), sampling)
    if kv == "none":
        generation = Generation(loaded, request, None)
        spec = None
        _answer(generation, quiet=as_json)
    else:
        spec = loaded.spec(kv)
        cache = loaded.cache(kv, memory=budget, shares=False)
        with cache.open() as sequence:
            generation = Generation(loaded, request, sequence)
            _answer(generation, quiet=as_json)
            generation.nbytes = cache.nbytes  # one sequence owns it all: slabs and all
    facts = _facts(loaded, generation, spec, 0 if spec is None else len(sequence))
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

    budget = _budget(memory)
    sampling = _sampling(temperature, top_p, top_k, seed, max_tokens, stop)
    _check_spec(kv, allow_none=False)
    _stdin()
    loaded = _load(model, weights, device)
    cache = loaded.cache(kv, memory=budget)
    Chat(loaded, cache, sampling, max_tokens, tuple(stop or ())).loop(_stderr(), as_json=as_json)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A well-known name (see --list), a config.json, a .gguf file, or a hub id.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence; by default the model's own context.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv: Annotated[
        str, typer.Option("--kv", help="What the cache keeps: f16, int8, k8v4, int4+window:1024,sinks:4 …")
    ] = "f16",
    weights: Annotated[
        str | None, typer.Option("--weights", help="How weights are held: f32, bf16, int8 or int4.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What it should fit into, such as 8GiB; by default this machine.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="A table of well-known models, smallest first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a cache costs and what fits, before a byte is allocated."""
    from kvik.plan import list_plans, render_list, render_plan, run_plan

    if show_list == (model is not None):
        raise UsageError("plan: name one model, such as 'kvik plan smollm2', or give --list")
    if model is None:
        if context is not None or batch != 1 or memory is not None:
            raise UsageError("plan --list takes no --context, --batch or --memory; name a model to use them")
        plans = list_plans(kv, weights)
        if as_json:
            print(json.dumps([each.to_dict() for each in plans], indent=2))
        else:
            render_list(plans, _stdout())
        return
    result = run_plan(model, context=context, batch=batch, kv=kv, weights=weights, memory=memory)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        render_plan(result, _stdout())


def _show_version(wanted: bool) -> None:
    if wanted:
        from kvik import __version__

        print(f"kvik {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A KV cache for transformers: run a model through it, or plan what it costs."""


def main() -> None:
    """The `kvik` command."""
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch loads: idle OpenMP threads soon stop burning a core
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False, prog_name="kvik")
    except KvikError as error:
        code = _complain(str(error))
    except typer.TyperException as error:
        code = _complain(f"{error.format_message()}; see 'kvik {_subcommand()}--help'")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (OSError, UnicodeError, MemoryError) as error:
        code = _complain(f"{type(error).__name__}: {error}")
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    line = " ".join(message.split())
    print(f"kvik: {line}", file=sys.stderr)
    return 2


def _subcommand() -> str:
    return f"{sys.argv[1]} " if sys.argv[1:] and sys.argv[1] in ("run", "chat", "plan") else ""


def _budget(memory: str | None) -> int | None:
    from kvik.units import parse_bytes

    return None if memory is None else parse_bytes(memory, "memory")


def _sampling(
    temperature: float, top_p: float, top_k: int, seed: int | None, max_tokens: int | None, stop: list[str] | None
) -> Sampling:
    """Checks everything about the answer before a model is loaded."""
    from kvik.engine.generation import Request
    from kvik.engine.sampling import Sampling

    given = {} if seed is None else {"seed": seed}
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, **given)
    return Request([0], max_tokens, tuple(stop or ()), sampling).sampling


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise UsageError("standard input is closed; give the prompt as an argument, or open it")
    return sys.stdin


def _check_spec(kv: str, *, allow_none: bool) -> None:
    """Complains about a wrong spec before the model is loaded."""
    from kvik.cache.spec import parse_rules

    if not (allow_none and kv == "none"):
        parse_rules(kv)


def _load(model: str, weights: str, device: str) -> Model:
    """Loads with a progress bar where there is something to prepare."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=_stderr(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(f"loading {model}", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        from kvik.models.model import load

        return load(model, weights=weights, device=device, progress=show)  # type: ignore[arg-type]


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
    held = generation.nbytes
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "prompt_tokens": len(generation.request.prompt),
        "cached_tokens": generation.cached_tokens,
        "new_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "note": generation.note,
        "ttft_s": round(generation.ttft_s, 4),
        "tokens_per_s": round(generation.tokens_per_s, 2),
        "kv_tokens": kept,
        "kv_bytes": held.payload,
        "kv_bytes_formula": 0 if spec is None else spec.nbytes(kept).payload,
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

    console = _stderr()
    lines = [
        f"{facts['prompt_tokens']} prompt + {facts['new_tokens']} new tokens ({facts['finish_reason']}) · "
        f"first after {facts['ttft_s']:.2f} s · then {facts['tokens_per_s']:.1f} tokens/s"
    ]
    if spec is None:
        lines.append("cache none: every step computed every token's keys and values again")
    else:
        lines.append(
            f"cache {spec}: {facts['kv_bytes']:,} B payload ({facts['kv_tokens']} tokens) "
            f"+ {facts['kv_overhead_bytes']:,} B overhead "
            f"= {facts['kv_allocated_bytes']:,} B"
        )
    lines.append(f"weights {facts['weights']}: {format_bytes(model.nbytes)}")
    if facts["note"]:
        lines.append(facts["note"])
    if facts["seed"] is not None:
        lines.append(f"seed {facts['seed']}")
    console.print("\n" + "\n".join(lines), style="dim", highlight=False, markup=False)


def _stdout() -> Console:
    from rich.console import Console

    return Console()


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


if __name__ == "__main__":
    main()
