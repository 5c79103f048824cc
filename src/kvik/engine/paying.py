"""How many guesses at once pay, from how often they were right and what they cost.

A guess is right with probability a as long as all before it were, so that k at once bring, in tokens a step,

    tokens(k) = 1 + a + a² + … + a^k = (1 - a^(k + 1)) / (1 - a)       arXiv:2211.17192, equation 1
    time(k)   = t · (1 + c·k)                                          its theorem 3.8

t is the time of a step without guesses, and c·t what one more guess adds for every answer: the draft's pass, a row in
the check, the choice of a token. The paper's c is the draft's pass alone, as the check of a few rows is taken to be
free; on a processor it is not, so c is measured whole. a is that of all answers of late; t and c are those of steps
with about as many answers, as far as there were any. The best k has the most tokens in the time. Where that is 0, a few
guesses are made now and then to see whether it still is, more and more seldom; where it isn't, a step without any is
made now and then, to know t.

Less than a twentieth is no gain: times are that uncertain, and who guesses again must first read
what it missed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST = 4  # guesses at once while nothing is known of what they cost
EVERY, SELDOM = 64, 1024  # steps from one trial to the next: at first, and at the most
TRIAL = 3  # steps of a trial; the draft reads up on what it missed in the first one
GAIN = 1.05  # that guesses must bring
_FADES = 0.99  # what was right or wrong counts less with every answer that is checked after it
_WEIGHT = 0.2  # of the newest measurement, once there are a few


@dataclass
class _Mean:
    value: float = 0.0
    count: int = 0

    def add(self, new: float) -> None:
        self.count += 1
        self.value += (new - self.value) * max(_WEIGHT, 1 / self.count)


@dataclass
class _Cost:
    """Of steps with about as many answers: `plain` seconds without guesses, and what `each` adds to that. Where none
    pay, the next trial begins with step `trial`, and the one after it `wait` steps later, or more."""

    plain: _Mean = field(default_factory=_Mean)
    each: _Mean = field(default_factory=_Mean)
    steps: int = 0
    trial: int = EVERY
    wait: int = EVERY


class Paying:
    """See the module's docstring.

    Attributes:
        most: guesses at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._right, self._tested = 3.0, 4.0  # before anything is known
        self._costs: dict[int, _Cost] = {}

    @property
    def rate(self) -> float:
        """How often a guess was right of late, where all before it were."""
        return self._right / self._tested

    def best(self, answers: int) -> int:
        """Guesses for each of so many answers in the next step."""
        own, size = self._cost(answers), answers.bit_length()
        own.steps += 1
        known = {at: cost for at, cost in self._costs.items() if cost.each.count}
        if own.plain.count < (1 if known else TRIAL):
            return 0
        if not known:
            return min(FIRST, self.most)
        cost = known[min(known, key=lambda at: abs(at - size))]
        found = best(self.rate, max(cost.each.value, 0.0) / cost.plain.value, self.most)
        if found:
            own.trial, own.wait = own.steps + EVERY, EVERY
            return 0 if own.steps % EVERY == 0 else found
        if own.steps < own.trial:
            return 0
        if own.steps == own.trial + TRIAL - 1:
            own.wait = min(2 * own.wait, SELDOM)
            own.trial = own.steps + own.wait
        return min(FIRST, self.most)

    def checked(self, guessed: int, right: int) -> None:
        """Of an answer's guesses so many were right, up to the first wrong one."""
        if guessed:
            self._right = _FADES * self._right + right
            self._tested = _FADES * self._tested + min(right + 1, guessed)

    def took(self, seconds: float, answers: int, guessed: int) -> None:
        """A step took so long that had nothing in it but answers and guesses, so many of them."""
        cost = self._cost(answers)
        if guessed == 0:
            cost.plain.add(seconds)
        elif cost.plain.count and guessed >= answers:
            cost.each.add((seconds - cost.plain.value) * answers / guessed)

    def _cost(self, answers: int) -> _Cost:
        return self._costs.setdefault(answers.bit_length(), _Cost())


def best(rate: float, cost: float, most: int) -> int:
    """How many guesses at once, up to `most`, give the most tokens in the time; 0 where none brings GAIN.

    Args:
        rate: how often one is right, where all before it were.
        cost: of one, as a part of a step without any.

    >>> best(0.8, 0.1, 8), best(0.8, 0.5, 8), best(0.3, 0.5, 8)
    (6, 2, 0)
    """
    tokens, found, fastest = 1.0, 0, GAIN
    for count in range(1, most + 1):
        tokens += rate**count
        if tokens / (1 + cost * count) > fastest:
            found, fastest = count, tokens / (1 + cost * count)
    return found
