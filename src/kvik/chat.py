"""Many turns over one Sequence: what a turn adds is computed, what was said before is known."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from kvik.cache.cache import Cache
from kvik.engine.generation import Generation, Request
from kvik.engine.sampling import Sampling
from kvik.errors import KvikError, SequenceError
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
        self.model.check_context(len(prompt) + 1)
        self._rewind(prompt)
        self.messages.append({"role": "user", "content": text})
        return Generation(self.model, Request(prompt, self.max_tokens, self.stop, self.sampling), self.sequence)

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
        except SequenceError:  # the window has dropped rows that the shorter text would see
            self.sequence.close()
            self.sequence = self.cache.open(prompt)

    def loop(self, console: Console) -> None:
        """Reads messages from the terminal until it ends. Prompts and facts go to `console`, answers to stdout."""
        console.print(
            f"{self.model.config.name} · cache {self.cache.spec} · {_HELP}", style="dim", highlight=False, markup=False
        )
        with contextlib.suppress(EOFError):
            while True:
                try:
                    text = _read(console)
                except KeyboardInterrupt:
                    console.print(f"\n({_HELP})", style="dim", highlight=False)
                    continue
                if text == "/exit":
                    break
                if text == "/reset":
                    self.reset()
                elif text:
                    self._turn(text, console)
        self.sequence.close()

    def _turn(self, text: str, console: Console) -> None:
        try:
            generation = self.ask(text)
        except KvikError as error:
            console.print(f"{error}; /reset starts anew", highlight=False, markup=False)
            return
        try:
            for piece in generation:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except KvikError as error:
            console.print(str(error), highlight=False, markup=False)
            self.forget_last()
            return
        print(flush=True)
        self.hear(generation)
        prompt, held = len(generation.request.prompt), generation.nbytes
        parts = [
            f"{generation.cached_tokens} of {prompt} tokens known",
            f"{len(generation.token_ids)} new ({generation.finish_reason})",
            f"{generation.tokens_per_s:.1f} tokens/s · {held.payload:,} + {held.overhead:,} = {held.allocated:,} B",
            *([generation.note] if generation.note else []),
        ]
        console.print(" · ".join(parts), style="dim", highlight=False, markup=False)


def _read(console: Console) -> str:
    console.print("› ", end="", style="bold", highlight=False)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()
