"""How likely texts are, and how they go on, over the rows that a spec keeps: what a harness of tasks asks of a model.

    context        c0 c1 … cn           continuation   t0 t1 … tm
    the prompt     c0 … cn-1, taken in and settled: what drops rows when a prompt ends has done so now
    then           cn t0 … tm-1 are fed to a fork; what is predicted after each is scored against t0 … tm

So each scored prediction is over the rows that the spec kept, the first included, as in `kvik eval`; where nothing is
dropped, holding cn back moves no bit. Texts that begin alike share pages; continuations of one context share it whole.
Log-likelihoods are in nats, summed in f64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby

import torch

from kvik.cache.cache import Cache
from kvik.cache.policy import When
from kvik.cache.sequence import Sequence as KVSequence
from kvik.engine.generation import Generation, prefill
from kvik.engine.request import Request
from kvik.errors import UsageError
from kvik.eval.caches import forced
from kvik.eval.measures import log_probabilities
from kvik.models.model import Model
from kvik.models.text.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]


class Scorer:
    """A model and what its cache keeps.

    Attributes:
        model: with a tokenizer.
        kv: spec string.
        longest: tokens that are fed at most; of longer texts the beginning is left out.
    """

    def __init__(
        self, model: Model, kv: str = "bf16", *, memory: int | None = None, longest: int | None = None
    ) -> None:
        """
        Args:
            model: loaded.
            kv: what the cache keeps.
            memory: the cache's budget in bytes; by default half of what is left.
            longest: by default all positions of the model.

        Raises:
            SpecError: the spec can't be read, or doesn't fit the model.
            UsageError: `longest` is none of the model's positions, or the model has no token to begin a text with.
            BudgetError: the machine has less than `memory`.
        """
        positions = model.config.max_positions
        self.longest = positions if longest is None else longest
        if not 1 <= self.longest <= positions:
            raise UsageError(f"texts of {longest} tokens: {model.config.name} has positions for 1 to {positions:,}")
        self.model, self.kv, self._memory = model, kv, memory
        self.cache = model.cache(kv, memory=memory)
        self.prefix = _first_token(model)
        self._prefix_text = self.tokenizer.decode([self.prefix], skip_special=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        assert self.model.tokenizer is not None, "text needs a tokenizer"
        return self.model.tokenizer

    @property
    def waits_for_a_prompt(self) -> bool:
        """Whether rows are dropped when a prompt ends: a text that is scored from its first token on has none."""
        policies = [group.retention.policy for group in self.cache.spec.groups]
        return any(policy is not None and policy.trigger.when is When.PROMPT for policy in policies)

    def encode(self, text: str) -> list[int]:
        """Token ids, with those that the tokenizer itself puts around a text, unless it begins with them already."""
        begun = bool(self._prefix_text) and text.startswith(self._prefix_text)
        return self.tokenizer.encode(text, add_special_tokens=not begun)

    def pair(self, context: str, continuation: str) -> Pair:
        """Ids of both, as one text has them: they are encoded together and cut where the context alone would end, and
        white space at its end goes to the continuation.

        Raises:
            UsageError: the continuation has no tokens of its own.
        """
        if context:
            kept = context.rstrip() or context
            whole, head = self.encode(context + continuation), self.encode(kept)
            ids = head, whole[len(head) :]
        else:
            whole = self.tokenizer.encode(continuation)
            ids = (whole[:1], whole[1:]) if whole[:1] == [self.prefix] else ([self.prefix], whole)
        if not ids[0] or not ids[1]:
            raise UsageError(f"a continuation of no tokens, {continuation[:40]!r}, can't be scored; give it some text")
        return ids

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float, bool]]:
        """Scores continuations, those of one context after one another.

        Yields:
            (which pair, log-likelihood of its continuation, whether each of its tokens is the likeliest).

        Raises:
            UsageError: a continuation is longer than `longest`.
            BudgetError: the cache has no room for a text.
        """
        cut = [self._cut(*pair) for pair in pairs]
        order = sorted(range(len(cut)), key=cut.__getitem__)
        for context, numbers in groupby(order, key=lambda number: cut[number][0]):
            *prompt, last = context
            with self.cache.open(prompt) as sequence:
                prefill(self.model, [sequence], prompt[len(sequence) :])
                for number in numbers:
                    target = cut[number][1]
                    with sequence.fork() as mine:
                        yield number, *self._follow(mine, [last, *target[:-1]], target)

    def rolling(self, tokens: Sequence[int]) -> float:
        """Log-likelihood of a whole text, after a token that begins texts. No token of it is a prompt: it goes in as
        `kvik eval --protocol stream` takes it, and what waits for a prompt's end drops nothing."""
        ids, total = [self.prefix, *tokens], 0.0
        for start, stop, scored in windows(len(tokens), self.longest):
            middle = stop - scored
            with self._alone.open() as sequence:
                prefill(self.model, [sequence], ids[start:middle])
                total += self._follow(sequence, ids[middle:stop], ids[middle + 1 : stop + 1])[0]
        return total

    def go_on(self, request: Request) -> str:
        """What the model writes after a prompt, as `kvik.generate` does: the text up to whatever ended it."""
        with self.cache.open(request.prompt) as sequence:
            return Generation(self.model, request, sequence).run().text

    @cached_property
    def _alone(self) -> Cache:
        """For texts that are opened without a prompt, of which nothing is ever known."""
        return self.model.cache(self.kv, memory=self._memory, shares=False)

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """A pair of which all but the last token can be fed."""
        if len(continuation) > self.longest:
            raise UsageError(
                f"a continuation of {len(continuation):,} tokens is longer than the {self.longest:,} that are fed at "
                "once; use a shorter one, or loglikelihood_rolling"
            )
        return context[-(self.longest + 1 - len(continuation)) :], continuation

    def _follow(self, sequence: KVSequence, fed: Sequence[int], targets: Sequence[int]) -> tuple[float, bool]:
        """Feeds tokens; log-likelihood of what comes after each, and whether all of that is the likeliest."""
        total, likeliest, at = 0.0, True, 0
        for logits in forced(self.model, sequence, fed):
            want = torch.tensor(targets[at : at + len(logits)], device=logits.device)
            total += float(log_probabilities(logits).gather(1, want[:, None]).sum())
            likeliest = likeliest and bool((logits.argmax(dim=-1) == want).all())
            at += len(logits)
        return total, likeliest


def windows(tokens: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """How a text that may be longer than what can be fed is scored, each token once and none without a context.

    Args:
        tokens: of the text; at index 0 of what is fed stands the token before it.
        longest: tokens that are fed at once.

    Yields:
        (start, stop, scored): ids [start:stop] are fed, and the last `scored` predictions count. The last window is as
        long as the others, for the sake of its context.

    >>> list(windows(10, 4))  # b 0 1 2 | 3 4 5 6 | 5 6 7 8, of which 5 and 6 are context: 4 + 4 + 2 tokens
    [(0, 4, 4), (4, 8, 4), (6, 10, 2)]
    >>> list(windows(3, 4)), list(windows(0, 4))
    ([(0, 3, 3)], [])
    """
    done = 0
    while done < tokens:
        scored = min(longest, tokens - done)
        done += scored
        yield max(done - longest, 0), done, scored


def _first_token(model: Model) -> int:
    """The token that begins texts, or else one that ends them: the context of what has none."""
    tokenizer = model.tokenizer
    found = None if tokenizer is None or tokenizer.bos_token is None else tokenizer.token_id(tokenizer.bos_token)
    if found is not None:
        return found
    if model.config.eos_ids:
        return model.config.eos_ids[0]
    raise UsageError(
        f"{model.config.name} has neither a first nor a last token, so a text's first token has no context; name a "
        "bos_token in tokenizer_config.json"
    )
