"""Sound to text, window by window (arXiv:2212.04356, §2.3 and §3.8).

    sound        |------ 30 s ------|
    text 1        <0.00> … <9.40><9.40> … <27.80>            its last part ends at 27.8 s: the next window begins there
                                 |------ 30 s ------|

A window's rows lie in the cache under their features' digest: whoever asks about the same sound again, with other
beams or at another temperature, finds them, and no encoder runs. A text that says the same thing over and over, or that
the model itself finds unlikely, is drawn again at higher temperatures; where the model hears no speech, there is none.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvik import events
from kvik.cache.cache import Cache
from kvik.cache.spec import Bytes, Spec
from kvik.engine.beams import Beam, beams
from kvik.engine.generation import prefill
from kvik.engine.sampling import Sampling, choose
from kvik.errors import UsageError
from kvik.models.constraints import Constraints
from kvik.models.hearing import TIME_STEP, HearingConfig
from kvik.models.mel import HOP, RATE, log_mel
from kvik.models.model import Model

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)  # where the likeliest text won't do, in this order
MOST_REPEATING = 2.4  # a text's bytes by those that zlib makes of them
LEAST_LIKELY = -1.0  # mean logarithm of a token's probability
NO_SPEECH = 0.6  # probability of the token that says so


@dataclass(frozen=True)
class Segment:
    """A part of a text.

    Attributes:
        start, end: seconds in the file.
        text: what was said.
    """

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Window:
    """What was heard in one window.

    Attributes:
        start: seconds in the file.
        seconds: of sound that are done with it: the next one begins behind them.
        segments: parts of its text, by its own times; the whole text where it has none.
        token_ids: of the text, times and the end among them.
        score: mean logarithm of a token's probability.
        temperature: at which it was drawn; 0 = the likeliest.
        speech: False = the model heard none, and nothing was kept of the text.
    """

    start: float
    seconds: float
    segments: tuple[Segment, ...]
    token_ids: tuple[int, ...]
    score: float
    temperature: float
    speech: bool

    @property
    def text(self) -> str:
        """Of all segments."""
        return " ".join(segment.text for segment in self.segments)


class Transcriber:
    """Hears files.

    Attributes:
        hearing: sizes of the model.
        encoded: how often the encoder ran.
        longest: tokens of the longest text, with what it began with.
    """

    def __init__(
        self, model: Model, cache: Cache, *, language: str | None = None, timed: bool = False, count: int = 1
    ) -> None:
        """
        Args:
            model: that hears.
            cache: of its rows.
            language: that is spoken, such as "de", where the model knows several.
            timed: whether texts hold the times of their parts. Sound longer than a window is always timed.
            count: beams; 1 = greedy.

        Raises:
            UsageError: the model hears nothing, or the language is missing, unknown, or can't be chosen.
            ConfigError: nothing says which of its tokens are times.
        """
        self.hearing = hears(model)
        assert model.tokenizer is not None, "text needs a tokenizer"
        self.model, self.cache, self.tokenizer = model, cache, model.tokenizer
        self.timed, self.count = timed, count
        token = None if language is None else self.tokenizer.token_id(f"<|{language}|>")
        if language is not None and token is None:
            raise UsageError(f"language {language!r}: the model has no token of that name; give one such as de")
        self._prompts = {timed: self.hearing.begin(token, timed=timed) for timed in (False, True)}
        self._rules = {timed: self.hearing.rules(timed=timed) for timed in (False, True)}
        self.encoded = self.longest = 0
        cache.listen(self._heard)

    def __call__(self, sound: Tensor) -> Iterator[Window]:
        """What is said in it, window after window.

        Args:
            sound: f32 [samples] at 16 kHz.

        Raises:
            BudgetError: the cache has no room for a window's rows, or for its text.
        """
        size, at = self.hearing.frames * HOP, 0
        timed = self.timed or len(sound) > size
        while at < len(sound):
            piece = sound[at : at + size]
            window = self._window(piece, at / RATE, timed)
            at += max(round(window.seconds * RATE), HOP)
            yield window

    def _heard(self, event: events.Event) -> None:
        self.encoded += isinstance(event, events.Filled)

    def _window(self, piece: Tensor, start: float, timed: bool) -> Window:
        features = log_mel(piece, self.hearing.mels, self.hearing.frames)
        source = self.model.fill(self.cache, features)
        beam, temperature, speech = self._text(source, timed)
        self.longest = max(self.longest, len(self._prompts[timed]) + len(beam.token_ids))
        seconds = len(piece) / RATE
        segments: list[Segment] = []
        if speech:
            parts, seconds = (
                self._parts(beam.token_ids, seconds) if timed else ([(0.0, seconds, beam.token_ids)], seconds)
            )
            for begins, ends, tokens in parts:
                if text := self._said(tokens):
                    segments.append(Segment(start + begins, start + ends, text))
        return Window(start, seconds, tuple(segments), beam.token_ids, beam.score, temperature, speech)

    def _text(self, source: bytes, timed: bool) -> tuple[Beam, float, bool]:
        """(the text, its temperature, whether there is speech at all)."""
        prompt, rules = self._prompts[timed], self._rules[timed]
        most = self.hearing.max_positions // 2 - len(prompt)
        beam = beams(
            self.model, self.cache, prompt, source=source, constraints=rules,
            count=self.count, max_tokens=most, early_stopping=self.count == 1,
        )[0]  # fmt: skip
        temperature = 0.0
        for next_one in TEMPERATURES:
            if not self._doubtful(beam):
                break
            if beam.score < LEAST_LIKELY and self._silence(source) > NO_SPEECH:
                return beam, temperature, False
            temperature = next_one
            beam = self._drawn(source, prompt, rules, most, temperature)
        return beam, temperature, True

    def _doubtful(self, beam: Beam) -> bool:
        raw = self._said(beam.token_ids).encode()
        return beam.score < LEAST_LIKELY or len(raw) / len(zlib.compress(raw)) > MOST_REPEATING

    def _said(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode([token for token in tokens if token < self.hearing.first_time])
        return text.strip()

    @torch.inference_mode()
    def _silence(self, source: bytes) -> float:
        """The probability that there is no speech: of the token before the one that says "no times"."""
        with self.cache.open(source=source) as sequence:
            logits = self.model.run([(sequence, [self.hearing.start_id])])[0]
        return float(logits.softmax(-1)[self.hearing.first_time - 2])

    @torch.inference_mode()
    def _drawn(self, source: bytes, prompt: list[int], rules: Constraints, most: int, temperature: float) -> Beam:
        """A text drawn at random, the same one every time."""
        sampling, ends = Sampling(temperature=temperature, seed=0), self.hearing.eos_ids
        text, total, limit = list(prompt), 0.0, len(prompt) + most
        with self.cache.open(source=source) as sequence:
            while len(text) < limit and (len(text) == len(prompt) or text[-1] not in ends):
                logits = prefill(self.model, [sequence], text[len(sequence) :]).cpu()
                allowed = rules.apply(logits, [text], began=len(prompt), limit=limit, ends=ends)[0]
                text.append(choose(allowed, sampling, len(text)))
                total += float(allowed.log_softmax(-1)[text[-1]])
        new = tuple(text[len(prompt) :])
        return Beam(new, total / len(new))

    def _parts(self, text: Sequence[int], seconds: float) -> tuple[list[tuple[float, float, Sequence[int]]], float]:
        """A window's text by its times.

        Args:
            seconds: of the window.

        Returns:
            [(start, end, tokens)] in seconds from its start, and where the next window begins.
        """
        zero = self.hearing.first_time
        tokens = [token for token in text if token not in self.hearing.eos_ids]
        timely = [token >= zero for token in tokens]
        cuts = [i for i in range(1, len(tokens)) if timely[i - 1] and timely[i]]
        closed = timely[-2:] == [False, True]  # nothing was cut off at the window's end
        if not cuts:
            known = [token for token, time in zip(tokens, timely, strict=True) if time]
            start = min((known[0] - zero) * TIME_STEP, seconds) if known else 0.0
            end = min((known[-1] - zero) * TIME_STEP, seconds) if len(known) > 1 else seconds
            return [(start, max(start, end), tokens)], seconds
        bounds = [0, *cuts, *([len(tokens)] if closed else [])]
        parts: list[tuple[float, float, Sequence[int]]] = []
        for piece in (tokens[a:b] for a, b in pairwise(bounds)):
            start, end = (min((time - zero) * TIME_STEP, seconds) for time in (piece[0], piece[-1]))
            parts.append((start, end, piece))
        after = parts[-1][1]
        return parts, seconds if closed or not after else after


def hears(model: Model) -> HearingConfig:
    """The sizes of a model that hears. Raises UsageError: it doesn't."""
    if not isinstance(model.config, HearingConfig):
        raise UsageError(f"{model.config.name} hears nothing; use a model that does, such as whisper-tiny.en")
    return model.config


def source_bytes(model: Model, spec: Spec) -> Bytes:
    """Of one window's rows, which all of its texts read."""
    rows = math.ceil(hears(model).frames / 2)
    return sum((group.nbytes(rows) for group in spec.groups if group.source), Bytes(0, 0))


def text_bytes(spec: Spec, tokens: int) -> Bytes:
    """Of one text's own rows."""
    return sum((group.nbytes(tokens) for group in spec.groups if not group.source), Bytes(0, 0))


def memory_for(model: Model, spec: Spec, count: int) -> int:
    """A budget in which two windows and one's beams have room."""
    window, text = source_bytes(model, spec), text_bytes(spec, hears(model).max_positions)
    return 2 * (window.payload + window.overhead) + (count + 1) * 2 * (text.payload + text.overhead) + (32 << 20)
