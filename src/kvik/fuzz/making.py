"""Traces from a seed: what has broken engines before, drawn at random.

beginnings    few, shared by most; cut at, before and behind the ends of pages; the same prompt again; turns of a
              chat, which go on from what another request is told
answers       greedy and drawn, one to three of a request, with penalties, biases, grammars, stops
crowds        requests come in bursts, and once more of them than the queue takes; some are too large
leaving       in the queue, in the prompt, in the answer, and while they wait to go on; readers that stop reading
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvik.engine.sampling import Sampling
from kvik.fuzz.trace import Abort, Ask, Part, Piece, Said, Trace, When, part_ids

PAGES = (0, 0, 31, 32, 33, 63, 64, 65, 96, 128)  # lengths of shared beginnings: of no page, and about the ends of some
SALTS = ("", "", "", "a", "b")
STAGES: tuple[When, ...] = ("", "queued", "queued", "prompt", "prompt", "answer", "answer", "answer", "preempted")


@dataclass(frozen=True)
class Sizes:
    """How large a trace's requests are.

    Attributes:
        longest: tokens of a prompt and its answer at the most.
        beginnings: lengths of what prompts share.
        own: tokens that a prompt has beside that, at the most.
        new: tokens of most answers, at the most.
        large: one request of so many is about three times as large in every way.
        answers, step_tokens, waiting: of the engine.
        gap: steps between two bursts, at the most.
    """

    longest: int
    beginnings: tuple[int, ...] = PAGES
    own: int = 40
    new: int = 16
    large: int = 25
    answers: int = 12
    step_tokens: int = 96
    waiting: int = 16
    gap: int = 24


def make(count: int, seed: int, vocabulary: int, sizes: Sizes, texts: tuple[str, ...] = ()) -> Trace:
    """A trace.

    Args:
        count: requests.
        seed: the same one gives the same trace.
        vocabulary: tokens there are.
        texts: what some answers stop at, where the model has texts.
    """
    rng = random.Random(seed)
    asks, aborts = list[Ask](), list[Abort]()
    at, left, stages = 0, 0, list[When]()
    crowd = rng.randrange(count)  # from here on a burst that the queue can't take
    for number in range(count):
        if number == crowd and count > sizes.waiting:
            left = max(left, sizes.waiting + 6)
        if left == 0:
            left = rng.choice([1, 1, 2, 3, 5, 8, 12])
            at += rng.randrange(sizes.gap + 1)
        left -= 1
        ask = _ask(rng, number, at, seed, vocabulary, sizes, texts, asks)
        asks.append(ask)
        if rng.random() < 0.22:
            stages = stages or rng.sample(STAGES, len(STAGES))  # each comes as often as it stands there
            aborts.append(_abort(rng, ask, stages.pop()))
    return Trace(
        vocabulary,
        sizes.answers,
        sizes.step_tokens,
        sizes.waiting,
        rng.randrange(1 << 31),
        tuple(asks),
        tuple(sorted(aborts, key=lambda abort: abort.at)),
    )


def _ask(
    rng: random.Random,
    number: int,
    at: int,
    seed: int,
    vocabulary: int,
    sizes: Sizes,
    texts: tuple[str, ...],
    before: list[Ask],
) -> Ask:
    scale = 3 if rng.randrange(sizes.large) == 0 else 1
    new = min(1 + rng.randrange(sizes.new * scale), sizes.longest // 2)
    own = Part(1000 * seed + 100 + number, 0, 1 + rng.randrange(sizes.own * scale))
    kind = rng.random()
    if before and kind < 0.08:  # the same again
        prompt = rng.choice(before[-40:]).prompt
    elif before and kind < 0.25:  # another turn of a chat
        other = rng.choice(before[-40:])
        prompt = (*other.prompt, Said(other.number, max(other.max_tokens - rng.randrange(3), 1)), own)
    else:
        length = rng.choice(sizes.beginnings) * scale + (rng.randrange(8) if rng.random() < 0.2 else 0)
        shared = Part(1000 * seed + rng.randrange(3), 0, length)
        prompt = (shared, own) if length else (own,)
    prompt = _fitting(prompt, sizes.longest - new - 1)
    few = part_ids(own, vocabulary)
    grammar = rng.randrange(2, 6) if rng.random() < 0.08 else None
    return Ask(
        number, at, prompt, new,
        sampling=_sampling(rng, few),
        n=rng.choice([1, 1, 1, 1, 2, 3]) if scale == 1 else 3,
        logprobs=rng.choice([None, 0, 0, 2, 5]),
        prompt_logprobs=rng.choice([None] * 9 + [1]),
        stop=(rng.choice(texts),) if texts and rng.random() < 0.2 else (),
        stop_ids=(rng.choice(few),) if rng.random() < 0.15 else (),
        ignore_end=rng.random() < 0.6,
        min_tokens=rng.randrange(new + 1) if grammar is None and rng.random() < 0.1 else 0,
        priority=rng.choice([0, 0, 0, 0, 1, -1]),
        salt=rng.choice(SALTS),
        grammar=grammar,
        reads=rng.randrange(4) if rng.random() < 0.05 else None,
    )  # fmt: skip


def _sampling(rng: random.Random, few: tuple[int, ...]) -> Sampling:
    seed = rng.randrange(1 << 32)
    if rng.random() < 0.5:
        return Sampling(seed=seed)
    return Sampling(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        top_k=rng.choice([0, 0, 20]),
        seed=seed,
        min_p=rng.choice([0.0, 0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
        bias={rng.choice(few): rng.choice([-4.0, 4.0])} if rng.random() < 0.15 else {},
    )


def _abort(rng: random.Random, ask: Ask, when: When) -> Abort:
    later = rng.randrange(12) if when in ("", "queued") and rng.random() < 0.7 else 0
    tokens = 1 + rng.randrange(ask.max_tokens) if when == "answer" else 0
    return Abort(ask.at + later, ask.number, when, tokens)


def _fitting(prompt: tuple[Piece, ...], most: int) -> tuple[Piece, ...]:
    """A prompt's first pieces: tokens of what is said are counted as if all of them were there."""
    found, left = list[Piece](), most
    for piece in prompt:
        if isinstance(piece, Said):
            kept: Piece = Said(piece.ask, min(piece.tokens, left))
            size = piece.tokens
        elif isinstance(piece, Part):
            kept, size = Part(piece.stream, piece.start, min(piece.end, piece.start + left)), piece.end - piece.start
        else:
            kept, size = piece[:left], len(piece)
        found.append(kept)
        left -= size
        if left <= 0:
            break
    return tuple(found)
