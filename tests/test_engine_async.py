"""The engine's face for asyncio: the same updates, and whoever leaves ends the request."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench_models import tiny
from kvik.engine.answers import Answer
from kvik.engine.engine import Engine
from kvik.errors import UsageError

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12] * 20]


async def _collected(engine: Engine, prompt: list[int], **options: object) -> list[Answer]:
    answers = [Answer() for _ in range(int(options.get("n", 1)))]  # type: ignore[call-overload]
    async for update in engine.stream(prompt, ignore_end=True, **options):
        answers[update.answer].take(update)
    return answers


def test_many_at_once_say_what_generate_says() -> None:
    async def all_of(engine: Engine) -> list[list[Answer]]:
        return await asyncio.gather(*(_collected(engine, prompt, max_tokens=12) for prompt in PROMPTS))

    with Engine(tiny(), "int8", memory=1 << 24) as engine:
        want = engine.generate(PROMPTS, max_tokens=12, ignore_end=True)
        got = [answers[0] for answers in asyncio.run(all_of(engine))]
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    assert all(answer.finish_reason == "length" and len(answer.token_ids) == 12 for answer in got)


def test_each_of_n_answers_comes_whole() -> None:
    with Engine(tiny(), "int8", memory=1 << 24) as engine:
        answers = asyncio.run(_collected(engine, PROMPTS[0], n=3, max_tokens=5, temperature=1.0, seed=4))
    assert [len(answer.token_ids) for answer in answers] == [5, 5, 5]


def test_who_leaves_ends_the_request() -> None:
    async def two(engine: Engine) -> int:
        seen, updates = 0, engine.stream(PROMPTS[2], ignore_end=True, max_tokens=400)
        async for _ in updates:
            seen += 1
            if seen == 2:
                break
        await updates.aclose()  # type: ignore[attr-defined]
        return seen

    with Engine(tiny(), "int8", memory=1 << 24) as engine:
        assert asyncio.run(two(engine)) == 2
        until = time.monotonic() + 20
        while engine.running and time.monotonic() < until:
            time.sleep(0.01)
        assert (engine.running, engine.counts.aborted) == (0, 1)
        assert engine.counts.new_tokens < 400


def test_a_request_that_cannot_be_served_says_so() -> None:
    async def bad(engine: Engine) -> None:
        async for _ in engine.stream([10**6]):
            raise AssertionError("no update was expected")

    with Engine(tiny(), "int8", memory=1 << 24) as engine, pytest.raises(UsageError, match="token ids must be"):
        asyncio.run(bad(engine))
