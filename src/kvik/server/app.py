"""The HTTP interface: which path does what. Made anew for each engine; nothing here is global."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from kvik import __version__
from kvik.engine.engine import Engine
from kvik.engine.grammar import Grammars
from kvik.errors import KvikError
from kvik.server import prompts, tools
from kvik.server.answers import Head, fingerprint, headers
from kvik.server.asks import Asks
from kvik.server.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from kvik.server.chat import ChatAnswer
from kvik.server.completions import CompletionAnswer
from kvik.server.desk import Desk, new_id
from kvik.server.gate import Gate
from kvik.server.metrics import Metrics
from kvik.server.problems import ProblemError
from kvik.server.settings import Settings
from kvik.server.snapshot import snapshot
from kvik.server.stream import GONE, EventStream, Json, begun, guarded, whole
from kvik.server.tenants import Tenants


def create(engine: Engine, settings: Settings, *, local: bool = True) -> tuple[ASGIApp, Desk]:
    """The application, and what it meets the engine through.

    Args:
        local: bound to this machine alone; see `Gate`.
    """
    tenants = Tenants(settings.keys, apart=settings.apart)
    desk = Desk(engine, settings, Metrics(engine, settings.names[0], tenants, vllm=settings.vllm_names))
    asks = Asks(engine, settings, Grammars(engine.model), tenants)
    app = FastAPI(title="kvik", version=__version__, redoc_url=None, default_response_class=Json)
    app.include_router(_answering(desk, asks))
    app.include_router(_texts(desk, asks))
    app.include_router(_state(desk, tenants))
    app.add_exception_handler(ProblemError, _problem)
    app.add_exception_handler(KvikError, _kvik_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    _honest_schema(app)
    return Gate(app, desk, local=local and not settings.keys.digests), desk


def _answering(desk: Desk, asks: Asks) -> APIRouter:
    """Chats and completions."""
    router = APIRouter(tags=["answers"])
    engine, named = desk.engine, fingerprint(desk.engine)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        asks.check_body(body)
        asks.check_shape(body)
        tenant = request.state.tenant
        made, offered = await asyncio.to_thread(_chat_request, asks, body, tenant)
        asked = desk.ask(new_id("chatcmpl"), tenant, [made])
        head = Head(asked.record.id, "chat.completion", body.model or desk.settings.names[0], named)
        answer = ChatAnswer(head, body, asked, prompts.tokenizer_of(engine.model), offered)
        return await _respond(answer, bool(body.stream), asked, request)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        asks.check_body(body)
        asks.check_shape(body, prompts.count(body))
        tenant = request.state.tenant
        made = await asyncio.to_thread(_completion_requests, asks, body, tenant)
        asked = desk.ask(new_id("cmpl"), tenant, made)
        head = Head(asked.record.id, "text_completion", body.model or desk.settings.names[0], named)
        answer = CompletionAnswer(head, body, asked, prompts.tokenizer_of(engine.model))
        return await _respond(answer, bool(body.stream), asked, request)

    return router


async def _respond(answer: ChatAnswer | CompletionAnswer, streams: bool, asked: Any, request: Request) -> Response:
    if not streams:
        return await whole(asked, request.receive, answer.whole(), lambda: headers(asked))
    try:
        if not await begun(asked, request.receive):
            return Response(status_code=GONE)
    except BaseException:
        asked.close()
        raise
    return EventStream(asked, guarded(answer.chunks()), headers(asked))


def _chat_request(asks: Asks, body: ChatBody, tenant: str) -> tuple[Any, Any]:
    """What takes time: the template, the tokens, the grammar. In a thread of its own."""
    model, tokenizer = asks.engine.model, prompts.tokenizer_of(asks.engine.model)
    offered = tools.wanted(body, tokenizer)
    grammar = asks.grammar(body)
    if offered and body.tool_choice not in (None, "auto"):
        grammar = asks.grammars.lark(tools.forced(offered, tokenizer))
    ids = prompts.chat(
        model, body.messages, offered, options=body.chat_template_kwargs, begin=body.add_generation_prompt is not False
    )
    return asks.request(body, ids, tenant, grammar), offered


def _completion_requests(asks: Asks, body: CompletionBody, tenant: str) -> list[Any]:
    grammar = asks.grammar(body)
    return [asks.request(body, ids, tenant, grammar) for ids in prompts.texts(asks.engine.model, body)]


def _texts(desk: Desk, asks: Asks) -> APIRouter:
    """Models, and text to tokens and back."""
    router = APIRouter(tags=["texts"])
    engine, model = desk.engine, desk.engine.model

    @router.get("/v1/models")
    async def models() -> Response:
        cards = [_card(name, engine) for name in desk.settings.names]
        return Json({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: Annotated[str, Path(max_length=1024)]) -> Response:
        if name not in desk.settings.names:
            raise ProblemError(404, f"the model {name!r} is not served here", param="model", code="model_not_found")
        return Json(_card(name, engine))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        asks.check_body(body)
        ids = await asyncio.to_thread(_tokens, asks, body)
        found = {"count": len(ids), "max_model_len": engine.longest, "tokens": ids}
        if body.return_token_strs:
            tokenizer = prompts.tokenizer_of(model)
            found["token_strs"] = [tokenizer.spelled(token).decode("utf-8", "replace") for token in ids]
        return Json(found)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        asks.check_body(body)
        tokenizer = prompts.tokenizer_of(model)
        return Json({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = prompts.tokenizer_of(model)
        return Json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "vocab_size": model.config.vocab_size,
                "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token,
                "chat_template": tokenizer.chat_template, "model_max_length": engine.longest,
            }
        )  # fmt: skip

    return router


def _tokens(asks: Asks, body: TokenizeBody) -> list[int]:
    model = asks.engine.model
    if (body.prompt is None) == (body.messages is None):
        raise ProblemError(400, "give a prompt or messages, one of the two", param="prompt", code="invalid_value")
    if body.messages is not None:
        return prompts.chat(model, body.messages, begin=body.add_generation_prompt is not False)
    return prompts.text(model, body.prompt, body.add_special_tokens is not False) if body.prompt else []


def _card(name: str, engine: Engine) -> dict[str, object]:
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "kvik", "root": engine.model.config.name,
        "parent": None, "max_model_len": engine.longest,
    }  # fmt: skip


def _state(desk: Desk, tenants: Tenants) -> APIRouter:
    """How the server is, and what it knows."""
    router = APIRouter(tags=["state"])
    engine = desk.engine

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        if engine.broken:
            raise ProblemError(503, "the engine has broken down; the server must be restarted", code="engine_broken")
        return Response()

    @router.get("/ready")
    @router.get("/readyz")
    async def ready() -> Response:
        desk.check()
        return Response()

    @router.get("/version")
    async def version() -> Response:
        return Json({"version": __version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await asyncio.to_thread(desk.metrics.text), media_type="text/plain; version=0.0.4")

    @router.get("/kvik/cache")
    async def cache(request: Request) -> Response:
        alone, who = len(desk.settings.keys.digests) < 2, tenants.number(request.state.tenant)
        found = await asyncio.to_thread(engine.asked, lambda: snapshot(engine, tenants, each=alone))
        return Json({**found, "tenant": who})

    @router.get("/kvik/requests/{id}")
    async def explained(id: Annotated[str, Path(max_length=128)], request: Request) -> Response:
        found = await asyncio.to_thread(desk.records.explain, id, request.state.tenant)
        if found is None:
            raise ProblemError(
                404, "no request of this key has this id; the last 1,024 are known, by their answers' ids",
                code="request_not_found",
            )  # fmt: skip
        return Json(found)

    return router


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError), "it was registered for these"
    return Json(error.body, error.status, error.headers)


async def _kvik_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvikError), "it was registered for these"
    return await _problem(request, ProblemError.of(error))


async def _invalid(request: Request, error: Exception) -> Response:
    """A body or path that is not as the schema says: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError), "it was registered for these"
    first = error.errors()[0]
    if first["type"] == "json_invalid":  # its place is a number of characters, and no field
        problem = ProblemError(400, f"the body is no JSON: {first['ctx']['error']}"[:200], code="invalid_value")
        return Json(problem.body, problem.status)
    where = [str(part) for part in first["loc"] if part != "body"]
    name, reason = ".".join(where)[:100] or None, str(first["msg"])[:200]
    problem = ProblemError(400, f"{name}: {reason}" if name else reason, param=name, code="invalid_value")
    return Json(problem.body, problem.status)


async def _http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, and bodies that can't be read."""
    assert isinstance(error, HTTPException), "it was registered for these"
    known = {404: "there is nothing at this path; see /docs", 405: "this path knows other methods; see /docs"}
    message = known.get(error.status_code, "the body is no JSON that can be read")
    problem = ProblemError(error.status_code, message, code={404: "not_found"}.get(error.status_code))
    return Json(problem.body, problem.status, dict(error.headers or {}))


def _honest_schema(app: FastAPI) -> None:
    """The published schema says 400 with our error body where FastAPI would say 422 with its own."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        for path in schema["paths"].values():
            for operation in path.values():
                if operation["responses"].pop("422", None) is not None:
                    operation["responses"]["400"] = {"description": "The request can't be used"}
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
