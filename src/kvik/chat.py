"""Many turns over one Sequence: what a turn adds is computed, what was said before is known."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvik.cache.cache import Cache
from kvik.engine.generation import Generation
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.errors import KvikError, SequenceError
from kvik.eval.caches import rows_held
from kvik.models.model import Model

if TYPE_CHECKING:
    from rich.console import Console

_HELP = "/reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


class Chat:
    """A conversation.

    Attributes:
        messages: so far, as chat templates take them.
        sequence: holds the rows of the text so far.
    """

    def __init__(
        self, model: Model, cache: Cache, sampling: Sampling, max_tokens: int | None, stop: tuple[str, ...]
    ) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        self.max_tokens, self.stop = max_tokens, stop
        self.messages: list[dict[str, str]] = []
        self.sequence = cache.open()

    def ask(self, text: str) -> Generation:
        """The answer to one more message; iterate over it, then `hear` it.

        Raises:
            ContextError: the conversation no longer fits the model; it stays as it was.
        """
        assert self.model.tokenizer is not None, "a chat needs a tokenizer"
        prompt = self.model.tokenizer.encode(
            self.model.tokenizer.chat([*self.messages, {"role": "user", "content": text}])
        )
        self.model.check_context(len(prompt) + 1, self.cache.spec)
        self._rewind(prompt)
        generation = Generation(self.model, Request(prompt, self.max_tokens, self.stop, self.sampling), self.sequence)
        self.messages.append({"role": "user", "content": text})
        return generation

    def hear(self, generation: Generation) -> None:
        """Makes an answer, finished or stopped, part of the conversation."""
        self.messages.append({"role": "assistant", "content": generation.text})

    def forget_last(self) -> None:
        """Takes the last message back: its answer failed."""
        self.messages.pop()

    def reset(self) -> None:
        """Starts anew."""
        self.messages.clear()
        self.sequence.close()
        self.sequence = self.cache.open()

    def _rewind(self, prompt: list[int]) -> None:
        """Trims the sequence to what it shares with the prompt, short of the prompt's last token."""
        known = self.sequence.tokens
        shared = next(
            (i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), min(len(known), len(prompt))
        )
        shared = min(shared, len(prompt) - 1)
        try:
            self.sequence.trim(shared)
        except SequenceError:  # rows have left that the shorter text would see
            self.sequence.close()
            self.sequence = self.cache.open(prompt)

    def loop(self, console: Console, *, as_json: bool = False) -> None:
        """Reads messages from the terminal until it ends. Prompts and facts go to `console`, answers to stdout.

        Args:
            as_json: one JSON object a turn on stdout instead, for programs.
        """
        _say(console, f"{self.model.config.name} · cache {self.cache.spec} · {_HELP}")
        with contextlib.suppress(EOFError):
            while True:
                try:
                    text = _read(console)
                except KeyboardInterrupt:
                    _say(console, f"\n({_HELP})")
                    continue
                if text == "/exit":
                    break
                if text == "/reset":
                    self.reset()
                elif text.startswith("/"):
                    _say(console, f"{text.split()[0]} is no command; {_HELP}")
                elif text:
                    self._turn(text, console, as_json)
        self.sequence.close()

    def _turn(self, text: str, console: Console, as_json: bool) -> None:
        asked = False
        try:
            with interruptible() as watch:
                generation = watch(self.ask(text))
                asked = True
                for piece in generation:
                    if not as_json:
                        print(piece, end="", flush=True)
                self.hear(generation)
        except KvikError as error:
            _say(console, f"{error}; /reset starts anew")
            if asked:
                self.forget_last()
            return
        facts = self._facts(generation)
        if as_json:
            print(json.dumps(facts, ensure_ascii=False), flush=True)
            return
        print(flush=True)
        held, rows = generation.nbytes, ""
        if facts["kv_rows"] < facts["kv_tokens"]:
            rows = f", {facts['kv_rows']:,.0f} of {facts['kv_tokens']:,} rows a head"
        parts = [
            f"{facts['cached_tokens']} of {facts['prompt_tokens']} tokens known",
            f"{facts['new_tokens']} new ({facts['finish_reason']})",
            f"{generation.tokens_per_s:.1f} tokens/s · {held.payload:,} + {held.overhead:,} = {held.allocated:,} B"
            f"{rows}",
            *([generation.note] if generation.note else []),
        ]
        _say(console, " · ".join(parts))

    def _facts(self, generation: Generation) -> dict[str, Any]:
        held, tokens = generation.nbytes, len(self.sequence)
        return {
            "text": generation.text,
            "prompt_tokens": len(generation.request.prompt),
            "cached_tokens": generation.cached_tokens,
            "new_tokens": len(generation.token_ids),
            "finish_reason": generation.finish_reason,
            "tokens_per_s": round(generation.tokens_per_s, 2),
            "kv_tokens": tokens,
            "kv_rows": round(rows_held(self.cache.spec, tokens, held.payload), 2),
            "kv_bytes": held.payload,
            "kv_overhead_bytes": held.overhead,
            "kv_allocated_bytes": held.allocated,
        }


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[Generation], Generation]]:
    """Inside it, Ctrl-C ends the generation that is being watched between two steps, instead of raising anywhere."""
    watched: list[Generation] = []
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        for generation in watched:
            generation.stop()

    def watch(generation: Generation) -> Generation:
        watched.append(generation)
        if pressed:
            generation.stop()
        return generation

    before = signal.signal(signal.SIGINT, note)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGINT, before)


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", highlight=False, markup=False)


def _read(console: Console) -> str:
    console.print("› ", end="", style="bold", highlight=False)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()
