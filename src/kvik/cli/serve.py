"""`kvik serve`: many requests at once, behind OpenAI's HTTP interface."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvik.cli.common import (
    INTERRUPTED,
    KV_HELP,
    BackendOption,
    DeviceOption,
    MemoryOption,
    ShareOption,
    WeightsOption,
    app,
    budget,
    check_backend,
    check_share,
    check_spec,
    load_model,
)
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.engine.engine import Engine
    from kvik.engine.quota import Quota
    from kvik.server.settings import Settings

_NEEDED = {"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"}


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="smollm2, a safetensors folder, a .gguf file, or a hub id.")] = "smollm2",
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 = any that is free.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; can be given several times.")
    ] = None,
    kv: Annotated[str, typer.Option("--kv", help=f"{KV_HELP}; tuned.")] = "bf16",
    memory: MemoryOption = None,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    share: ShareOption = None,
    backend: BackendOption = "kvik",
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer; by default as many as the model can.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 32,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 512,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 256,
    guesses: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens of each answer that are guessed at once, from its text or by --draft; no answer is another. "
            "By default none, or up to 8 by a draft.",
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A faster model with the same tokens, which guesses what answers say next.")
    ] = None,
    draft_weights: Annotated[str, typer.Option(help="How the draft's weights are held, such as int4.")] = "auto",
    draft_kv: Annotated[str, typer.Option("--draft-kv", help="What the draft's cache keeps.")] = "int8",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="KVIK_API_KEY", show_envvar=True, help="A key that may ask; can be given several times."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    share_prefixes: Annotated[
        bool, typer.Option("--share-prefixes", help="What one key's prompts left may be found by another's.")
    ] = False,
    tenant_quota: Annotated[
        str,
        typer.Option(
            help="What each key keeps of the cache when others flood it: a size, or a part such as 20%, that no "
            "request of another's can take; fair: an equal part, unless a request fits only without it; none: "
            "whatever was used least recently goes."
        ),
    ] = "fair",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without a key: anybody there may ask.")
    ] = False,
    requests_per_key: Annotated[int, typer.Option(min=1, help="Requests of one key at once.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take, waiting included.")] = 1800.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to finish what runs, after SIGTERM.")] = 30.0,
    metrics: Annotated[
        Literal["kvik", "vllm"], typer.Option(help="Names at /metrics: kvik's own, or vLLM's beside them.")
    ] = "kvik",
    uvicorn_log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug"], typer.Option(help="info shows every request.")
    ] = "warning",
) -> None:
    """Serve a model over HTTP, as OpenAI does: chats, completions, tools, JSON schemas; prefixes stay warm."""
    room = budget(memory)
    check_spec(kv, allow_none=False)
    check_share(share)
    check_backend(backend, share)
    check_spec(draft_kv, allow_none=False)
    if draft is None and (draft_weights, draft_kv) != ("auto", "int8"):
        raise UsageError("--draft-weights and --draft-kv are of a draft, and none was given; give --draft too")
    _check_installed()
    from kvik.server.gate import is_local
    from kvik.server.keys import Keys
    from kvik.server.running import Server, bound
    from kvik.server.settings import Limits, Settings

    if not all(name.strip() for name in served_model_name or ()):
        raise UsageError("--served-model-name '' is empty, so no client could name it; give a name, or leave it out")
    keys = Keys.of(api_key or [], api_key_file)
    if not is_local(host) and not keys.digests and not insecure:
        raise UsageError(
            f"--host {host} can be reached from other machines, and anybody there could ask; give --api-key, or "
            "--insecure if that is meant"
        )
    quota = _quota(tenant_quota, len(keys.digests), room)
    settings = Settings(
        names=tuple(served_model_name or (model,)), keys=keys, share_prefixes=share_prefixes,
        apart=tenant_quota != "none", vllm_names=metrics == "vllm", drain_s=drain,
        limits=Limits(requests_per_key=requests_per_key, seconds=timeout),
    )  # fmt: skip
    with bound(host, port) as socket:  # a port that is taken is found before a model is loaded
        loaded = load_model(model, weights, device, share, backend=backend)
        guessing = None if draft is None else load_model(draft, draft_weights, device)
        from kvik.engine.engine import Engine

        with Engine(
            loaded, kv, memory=room, running=max_num_seqs, step_tokens=max(max_num_batched_tokens, max_num_seqs),
            waiting=max_waiting, guesses=guesses, draft=guessing, draft_kv=draft_kv, longest=max_model_len,
            quota=quota,
        ) as engine:  # fmt: skip
            if guessing is not None and engine.draft_cache is None:
                raise UsageError(
                    f"--draft: {engine.cache.spec} adds up attention, which can't be taken back with a wrong guess; "
                    "choose another --kv, or leave --draft out"
                )
            engine.check_room()
            if max_model_len is not None and max_model_len > engine.longest:
                raise UsageError(
                    f"--max-model-len {max_model_len:,} is more than the {engine.longest:,} tokens that "
                    f"{loaded.config.name} can; use at most {engine.longest}, or leave it out"
                )
            server = Server(engine, settings, host=host, log_level=uvicorn_log_level)
            server.banner = _banner(engine, settings, host, socket.getsockname()[1], draft)
            gc.collect()
            gc.freeze()  # what is loaded stays: collections need not look at it again
            server.run(sockets=[socket])
            if server.interrupted:
                raise typer.Exit(INTERRUPTED)


def _quota(text: str, keys: int, room: int | None) -> Quota | None:
    """What each key was promised, if anything. Raises UsageError before a model is loaded, where that can be."""
    from kvik.engine.quota import Quota
    from kvik.units import parse_part

    if text in ("fair", "none"):
        return None
    quota = Quota(parse_part(text, "tenant-quota"), keys)
    if not keys:
        raise UsageError(f"--tenant-quota {text}: without API keys all requests are one tenant's; give --api-key")
    if room is not None:
        quota.bytes_of(room)
    return quota


def _banner(engine: Engine, settings: Settings, host: str, port: int, draft: str | None) -> str:
    """The line that says that it answers."""
    from kvik.units import format_bytes

    keys = len(settings.keys.digests)
    where = f"[{host}]" if ":" in host else host
    parts = [
        f"kvik: {settings.names[0]} at http://{where}:{port}/v1",
        f"cache {engine.cache.spec}, {format_bytes(engine.cache.budget)}",
        *_drafts(engine, draft),
        f"up to {engine.longest:,} tokens",
        f"{keys} API key{'s' * (keys != 1)}" if keys else "no API key",
    ]
    if engine.cache.owners.quota is not None:
        parts.append(f"{format_bytes(engine.cache.owners.quota)} for each")
    return " · ".join(parts)


def _drafts(engine: Engine, draft: str | None) -> list[str]:
    from kvik.units import format_bytes

    cache = engine.draft_cache
    return [] if cache is None else [f"draft {draft}, {cache.spec}, {format_bytes(cache.budget)}"]


def _check_installed() -> None:
    """Raises UsageError where the extra is missing."""
    import importlib.util

    missing = sorted(name for name in _NEEDED if importlib.util.find_spec(name) is None)
    if missing:
        raise UsageError(f"serving needs {', '.join(missing)}, not installed here; pip install 'kvik[serve]'")
