"""A smaller model guesses what answers say next; the engine's own checks it (arXiv:2211.17192, sec. 2).

    text       … the cat sat |                    certain
    draft      … the cat sat | on the hat         one token in each of three passes, for all answers together
    check                    | on the mat         one pass of the model: two were right, and "mat" is its own
    then       … the cat sat   on the mat |       the draft's sequence is trimmed to "the", and reads "mat" next

The draft has a cache, keys and sequences of its own. It reads prompts when their answers begin, and finds there what
other texts left, under the same salts. Guesses are pending in its sequences until they were checked; only what is
certain is settled, so that nothing is published or dropped for a guess.

It draws as the answer will: its logits go the same way, through penalties, grammar and temperature, and get the same
noise (`guesses.py` says why). How many guesses are made at once follows from what they bring (`paying.py`).

Room: where its cache has none, the youngest goes without, and nobody new begins until some other text is over. Who has
no room alone goes without for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvik import events
from kvik.cache.books import bytes_in_use
from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Spec
from kvik.engine.generation import prefill
from kvik.engine.guesses import Guesser
from kvik.engine.job import Task
from kvik.engine.paying import Paying
from kvik.errors import BudgetError, ContextError, EngineError, UsageError
from kvik.models.model import Model

FEW = 16  # tokens that a sequence may lack and still guess at once; more are read before


@dataclass
class _Line:
    """An answer, and what may come next in it."""

    task: Task
    most: int
    text: list[int]
    guesses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grammar = None if self.task.grammar is None else self.task.grammar.copy()

    @property
    def sequence(self) -> KVSequence:
        assert self.task.draft is not None, "it is ready"
        return self.task.draft

    @property
    def lacking(self) -> list[int]:
        """What the sequence has not read, of the text and of what was guessed."""
        at = len(self.sequence)
        return [*self.text[at:], *self.guesses[max(at - len(self.text), 0) :]]

    def take(self, logits: Tensor, model: Model) -> bool:
        """One more guess, from logits f32 [vocabulary]. False: no more can come."""
        try:
            token = self.task.chosen(logits, model, [*self.task.answer, *self.guesses], self.grammar)
            self.guesses.append(token)
            if token in self.task.job.ends:
                return False
            if self.grammar is not None:
                self.grammar.take(token)
                if self.grammar.done:
                    return False
        except EngineError:  # its grammar can't be followed, which is for the check to say
            return False
        return len(self.guesses) < self.most


class Draft(Guesser):
    """See the module's docstring.

    Attributes:
        model: that guesses.
        cache: its own.
        paying: how many guesses are worth it.
    """

    def __init__(self, model: Model, cache: Cache, target: Model, most: int) -> None:
        """
        Args:
            target: the model that checks; see `check_pair`.
            most: tokens of an answer at once.

        Raises:
            UsageError: a policy chooses what the draft keeps.
        """
        if any(group.retention.policy is not None for group in cache.spec.groups):
            raise UsageError(
                f"the draft's cache {cache.spec}: a policy's choices can't be taken back with a wrong guess; use "
                "full rows or a window, such as int8+window:1024,sinks:4"
            )
        self.model, self.cache, self.most = model, cache, most
        self.paying = Paying(most)
        self._target = target
        self._full = False  # somebody had to go: nobody new begins until a text is over
        self._read = 0  # tokens that were read in the last call before guesses were made
        cache.listen(self._heard)

    def guess(self, asks: Sequence[tuple[Task, int]], reading: int) -> list[list[int]]:
        """See `Guesser`."""
        self._read = 0
        count = self.paying.best(len(asks)) if asks else 0
        lines = [_Line(task, min(most, count), task.tokens) for task, most in asks if min(most, count) > 0]
        going = self._ready(lines, reading)
        while going:
            rows, going = self._logits(going)
            going = [line for line, row in zip(going, rows, strict=True) if line.take(row, self._target)]
        found = {id(line.task): line.guesses for line in lines}
        return [found.get(id(task), []) for task, _ in asks]

    def checked(self, guessed: int, right: int) -> None:
        """See `Guesser`."""
        self.paying.checked(guessed, right)

    def took(self, seconds: float, answers: int, guessed: int) -> None:
        """See `Guesser`."""
        if not self._read:
            self.paying.took(seconds, answers, guessed)

    def _ready(self, lines: Sequence[_Line], reading: int) -> list[_Line]:
        """Those whose sequences have their texts, but for a few tokens."""
        ready, longest = [], self.model.longest(self.cache.spec)
        for line in lines:
            line.most = min(line.most, longest - len(line.text))
            if line.most < 1 or not self._open(line, reading - self._read):
                continue
            try:
                self._read_up(line, reading - self._read)
            except BudgetError:
                self._give_up(line)
            else:
                if len(line.lacking) <= FEW:
                    ready.append(line)
        return ready

    def _open(self, line: _Line, reading: int) -> bool:
        """Gives an answer a sequence with what is known of its text, if there is room for it all."""
        if line.task.draft is not None:
            return True
        if self._full or line.task.undrafted or reading < 1:  # what others are reading can't be found yet
            return False
        request, spec = line.task.job.request, self.cache.spec
        try:
            source = None if request.source is None else self.model.fill(self.cache, request.source, request.salt)
            line.task.draft = sequence = self.cache.open(line.text, request.salt, source)
        except BudgetError:
            self._give_up(line)
            return False
        except ContextError:  # the draft has fewer positions for sources
            return False
        more = spec.nbytes(len(line.text) + self.most).allocated - spec.nbytes(len(sequence)).allocated
        if bytes_in_use(self.cache) + more > self.cache.budget:
            self._give_up(line)
            return False
        return True

    def _read_up(self, line: _Line, reading: int) -> None:
        """Takes guesses back that were wrong, and reads what is missing, so many tokens at the most."""
        sequence = line.sequence
        sequence.trim(agreed(sequence.tokens, line.text, self.most))
        sequence.settle()
        missing = line.lacking[:-1]
        if len(missing) >= FEW and reading > 0:
            prefill(self.model, [sequence], missing[:reading])
            self._read += len(missing[:reading])

    def _logits(self, lines: list[_Line]) -> tuple[Tensor, list[_Line]]:
        """After what each lacks, f32 [lines, vocabulary], and whose it is. The youngest go where there is no room."""
        while lines:
            try:
                return self.model.run([(line.sequence, line.lacking) for line in lines]), lines
            except BudgetError:
                *lines, youngest = sorted(lines, key=lambda line: line.task.job.order)
                self._give_up(youngest)
        return Tensor(), []

    def _give_up(self, line: _Line) -> None:
        if line.task.draft is not None:
            line.task.draft.close()
            line.task.draft = None
        self._full = bool(self.cache.sequences)
        line.task.undrafted = not self._full

    def _heard(self, event: events.Event) -> None:
        if isinstance(event, events.Closed):
            self._full = False


def agreed(held: Sequence[int], text: Sequence[int], last: int) -> int:
    """How many first tokens of a text a sequence may keep, the text's last one left to be read.

    Args:
        held: the sequence's tokens; only the last so many of them may be wrong.
    """
    stop = min(len(held), len(text) - 1)
    return next((at for at in range(max(len(held) - last, 0), stop) if held[at] != text[at]), stop)


def share(total: int, spec: Spec, draft: Spec, tokens: int) -> int:
    """How many of `total` bytes are the draft's: so many that both caches have room for the same texts, and half at the
    most, since what the model itself can't keep costs more.

    Args:
        tokens: of a text: what a window keeps is the same from some length on.
    """
    mine, theirs = spec.nbytes(tokens).allocated, draft.nbytes(tokens).allocated
    return min(total * theirs // max(mine + theirs, 1), total // 2)


def check_pair(model: Model, draft: Model) -> None:
    """Raises UsageError where one model can't guess for the other: it must have the same tokens, and read the same."""
    name, other = draft.config.name, model.config.name
    if (draft.reading is None) != (model.reading is None) or draft.encoder is not None:
        raise UsageError(f"the draft {name} does not read what {other} reads, so it can't guess; use one of its family")
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    differ = f"the draft {name} has other tokens than {other}"
    if ours != theirs:
        raise UsageError(f"{differ} ({theirs:,} and {ours:,}), so it can't guess them; use one of the same family")
    if model.tokenizer is None or draft.tokenizer is None or model.tokenizer.folder == draft.tokenizer.folder:
        return
    for token in range(ours):
        mine, its = model.tokenizer.spelled(token), draft.tokenizer.spelled(token)
        if mine != its:
            raise UsageError(
                f"{differ} (token {token} is {its!r} and {mine!r}), so it can't guess them; use one of the same family"
            )
