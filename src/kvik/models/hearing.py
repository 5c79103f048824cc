"""What models that hear have in common: windows of sound go in, text with the times of its parts comes out
(Whisper, arXiv:2212.04356).

    <start> [<language> <task>] <untimed>  text … <end>
    <start> [<language> <task>]  <0.00> text … <4.20><4.20> text … <9.96> … <end>

Times are tokens: the one behind <untimed> is 0 s, and each further one is 0.02 s later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvik.errors import ConfigError, ContextError, UsageError
from kvik.models.config import first_id
from kvik.models.constraints import Constraints
from kvik.models.fields import Fields
from kvik.models.reading import ReaderConfig

TIME_STEP = 0.02  # seconds from one time's token to the next one's


@dataclass(frozen=True, kw_only=True)
class HearingConfig(ReaderConfig):
    """A decoder that reads sound. `source_positions` are frames of its log-mel spectrogram.

    Attributes:
        mels: channels of a frame.
        untimed_id: the token that says "no times"; None = its makers don't say which.
        latest_first: how many time steps after 0 the first time may be at the most; None = any.
        languages: tokens of the languages that it knows; none = it knows one, and texts don't name it.
        transcribe_id: the task's token, of a model with languages.
    """

    mels: int
    untimed_id: int | None
    latest_first: int | None
    languages: tuple[int, ...]
    transcribe_id: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = [*self.languages, *(i for i in (self.untimed_id, self.transcribe_id) if i is not None)]
        if beyond := [token for token in ids if token >= self.vocab_size]:
            raise ConfigError(
                f"{self.name}: a token that steers it is {beyond[0]}, but its vocabulary ends at "
                f"{self.vocab_size - 1}; use a file that kvik supports"
            )

    @property
    def frames(self) -> int:
        """Of a window."""
        assert self.source_positions is not None, "positions of the encoder are a table"
        return self.source_positions

    @property
    def first_time(self) -> int:
        """The token of 0 s. Raises ConfigError."""
        if self.untimed_id is None:
            raise ConfigError(
                f"{self.name}: nothing says which tokens are times, so it can't transcribe; add its "
                "generation_config.json with no_timestamps_token_id"
            )
        return self.untimed_id + 1

    def check_source(self, source: Tensor) -> None:
        """See `ReaderConfig.check_source`: features, f32 [frames, mels]."""
        if source.dtype != torch.float32 or source.dim() != 2 or source.shape[1] != self.mels:
            raise UsageError(
                f"{self.name} hears features, f32 [frames, {self.mels}], but got {tuple(source.shape)} of "
                f"{str(source.dtype).removeprefix('torch.')}; use models.mel.log_mel"
            )
        if not len(source):
            raise UsageError("the source is empty; give at least one frame")
        if len(source) > self.frames:
            raise ContextError(
                f"a source of {len(source):,} frames is longer than the {self.frames:,} of {self.name}'s encoder; "
                "give it in windows"
            )

    def begin(self, language: int | None, *, timed: bool) -> list[int]:
        """What a text begins with.

        Args:
            language: its token; None for a model with one language.
            timed: whether the text is to hold times.

        Raises:
            UsageError: the language is missing, unknown, or can't be chosen.
        """
        if self.languages and language not in self.languages:
            raise UsageError(f"{self.name} knows {len(self.languages)} languages; say which one is spoken")
        if language is not None and not self.languages:
            raise UsageError(f"{self.name} knows one language, so none can be chosen; leave it out")
        chosen = [] if language is None else [language]
        task = [self.transcribe_id] if chosen and self.transcribe_id is not None else []
        return [self.start_id, *chosen, *task, *([] if timed else [self.first_time - 1])]

    def rules(self, *, timed: bool) -> Constraints:
        """Which tokens may come where in such a text."""
        if not timed:
            return self.constraints
        given = {key: getattr(self.constraints, key) for key in asdict(self.constraints)}
        return TimeRules(**given, first_time=self.first_time, latest_first=self.latest_first)


@dataclass(frozen=True)
class TimeRules(Constraints):
    """Constraints, and where times may come: first of all one, then text between two of them, never backwards.

    Attributes:
        first_time: the token of 0 s; all above it are times, the one below it says that there are none.
        latest_first: see `HearingConfig`.
    """

    first_time: int = 0
    latest_first: int | None = None

    def apply(
        self, scores: Tensor, texts: Sequence[Sequence[int]], *, began: int, limit: int, ends: Sequence[int]
    ) -> Tensor:
        """See `Constraints.apply`. A time must come where all times together are likelier than any other token."""
        scores = super().apply(scores, texts, began=began, limit=limit, ends=ends).clone()
        time = self.first_time
        scores[:, time - 1] = -torch.inf
        for row, text in enumerate(texts):
            new = text[began:]
            if not new:
                scores[row, :time] = -torch.inf
                if self.latest_first is not None:
                    scores[row, time + self.latest_first + 1 :] = -torch.inf
                continue
            after_time = new[-1] >= time
            opens = after_time and (len(new) < 2 or new[-2] >= time)  # text must follow
            if opens:
                scores[row, time:] = -torch.inf
            elif after_time:  # it closed a part: the next one's, or an end
                ended = scores[row, list(ends)]
                scores[row, : max(ends, default=time)] = -torch.inf
                scores[row, list(ends)] = ended
            if past := [token for token in new if token >= time]:
                scores[row, time : past[-1] + (not after_time or opens)] = -torch.inf
        shares = scores.log_softmax(-1)
        timely = shares[:, time:].logsumexp(-1) > shares[:, :time].amax(-1)
        scores[:, :time] = scores[:, :time].masked_fill(timely[:, None], -torch.inf)
        return scores


def hearing(fields: Fields, generation: Fields) -> dict[str, object]:
    """What generation_config.json says about times, languages and tasks, as `HearingConfig`'s fields. Raises
    ConfigError."""
    languages, tasks = (_ids(generation, key) for key in ("lang_to_id", "task_to_id"))
    latest = "max_initial_timestamp_index"
    return dict(
        mels=fields.integer("num_mel_bins", 80, most=2**12),
        untimed_id=first_id(generation, "no_timestamps_token_id"),
        latest_first=generation.integer(latest, least=0) if generation.has(latest) else None,
        languages=tuple(languages.values()),
        transcribe_id=tasks.get("transcribe"),
    )


def without_prompt(fields: Fields) -> Fields:
    """The same without `forced_decoder_ids`: older files say there what `HearingConfig.begin` says."""
    return Fields({key: value for key, value in fields.values.items() if key != "forced_decoder_ids"}, fields.where)


def _ids(fields: Fields, key: str) -> dict[str, int]:
    """A mapping of names to token ids."""
    found = fields.values[key] if fields.has(key) else {}
    if not isinstance(found, dict):
        fields.fail(key, "must be a mapping of names to token ids")
    checked = Fields(found, f"{fields.where}: {key}")
    return {str(name): checked.integer(name, least=0) for name in found}
