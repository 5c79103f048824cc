"""Texts with times: rules against transformers', windows, fallback; what beams and second passes share."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

import readers
from helpers import listening
from kvik import events
from kvik.cache.books import bytes_in_use
from kvik.engine import transcription
from kvik.engine.beams import Beam, beams
from kvik.engine.generation import ask
from kvik.engine.subtitles import FORMATS
from kvik.engine.transcription import Segment, Transcriber, source_bytes, text_bytes
from kvik.errors import ConfigError, ContextError, UsageError
from kvik.models import families
from kvik.models.files.weights import check
from kvik.models.hearing import TimeRules
from kvik.models.mel import HOP, RATE
from kvik.models.model import Model
from readers import drawn

MEMORY = 32 << 20
UNTIMED, ZERO, END = 95, 96, 90
GENERATION = {
    "no_timestamps_token_id": UNTIMED, "eos_token_id": END, "decoder_start_token_id": 91,
    "suppress_tokens": [5, 91, 92], "begin_suppress_tokens": [7, END], "max_initial_timestamp_index": 20,
}  # fmt: skip
SIZES = dict(  # a window of 1.2 s, times to 1.2 s
    max_source_positions=60, vocab_size=157, max_target_positions=120, decoder_start_token_id=91, eos_token_id=END
)  # fmt: skip


class Letters:
    """A tokenizer: ids below 90 are letters, others nothing."""

    def decode(self, ids):
        return "".join(chr(33 + i) for i in ids if i < END)

    def token_id(self, token):
        return {"<|de|>": 93, "<|end|>": END}.get(token)


def hearer(**settings):
    """(transformers' model, ours)."""
    theirs = drawn("whisper", **SIZES)
    config = families.from_hf(theirs.config.to_dict(), GENERATION | settings, "tiny")
    return theirs, Model(config, check(theirs.state_dict(), config), weights="f32", tokenizer=Letters())


@pytest.fixture(scope="module")
def pair():
    return hearer()


@pytest.fixture
def model(pair):
    return pair[1]


def noise(seconds, seed=0):
    return torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("latest", [20, None])
def test_times_come_where_transformers_lets_them(model, latest):
    rules = TimeRules(first_time=ZERO, latest_first=latest)
    config = SimpleNamespace(
        no_timestamps_token_id=UNTIMED, eos_token_id=END, bos_token_id=1, max_initial_timestamp_index=latest
    )
    theirs = WhisperTimeStampLogitsProcessor(config, begin_index=2)
    g = torch.Generator().manual_seed(0)
    forced = 0
    for case in range(300):
        new = torch.randint(0, END, (case % 7,), generator=g)
        times = ZERO + torch.randint(0, 50, (case % 7,), generator=g).sort().values
        text = [91, 93, *torch.where(torch.rand(case % 7, generator=g) < 0.5, times, new).tolist()]
        scores = torch.randn(1, 157, generator=g) * 3
        got = rules.apply(scores, [text], began=2, limit=100, ends=(END,))
        want = theirs(torch.tensor([text]), scores)
        assert torch.equal(got, want), text
        forced += bool((got[0, :END] == -torch.inf).all() and (got[0, ZERO:] > -torch.inf).any())
    assert forced > 50


@pytest.mark.parametrize("count", [1, 3])
def test_timed_texts_are_those_of_transformers(pair, count):
    theirs, model = pair
    given = readers.source(model, 90, 4)
    config = SimpleNamespace(
        no_timestamps_token_id=UNTIMED, eos_token_id=END, bos_token_id=1, max_initial_timestamp_index=20
    )
    want = readers.generate(
        theirs, given, decoder_input_ids=torch.tensor([[91]]), num_beams=count, max_new_tokens=30, do_sample=False,
        eos_token_id=END, pad_token_id=1, suppress_tokens=[5, 91, 92], begin_suppress_tokens=[7, END], use_cache=False,
        logits_processor=[WhisperTimeStampLogitsProcessor(config, begin_index=1)],
    )[0].tolist()  # fmt: skip
    cache = model.cache("f32", memory=MEMORY)
    got = beams(
        model, cache, [91], source=model.fill(cache, given), count=count, max_tokens=30,
        constraints=model.reading.rules(timed=True), early_stopping=count == 1,
    )[0].token_ids  # fmt: skip
    assert [91, *got] == want[: 1 + len(got)] and sum(token >= ZERO for token in got) > 2


def test_what_texts_begin_with(model):
    assert model.reading.begin(None, timed=False) == [91, UNTIMED]
    assert model.reading.begin(None, timed=True) == [91]
    with pytest.raises(UsageError, match="one language"):
        model.reading.begin(93, timed=True)
    languages = {"lang_to_id": {"<|de|>": 93}, "task_to_id": {"transcribe": 94}}
    many = hearer(**languages)[1]
    assert many.reading.begin(93, timed=False) == [91, 93, 94, UNTIMED]
    for wrong in (None, 92):
        with pytest.raises(UsageError, match="say which one is spoken"):
            many.reading.begin(wrong, timed=False)
    cache = many.cache("f32", memory=MEMORY)
    assert next(Transcriber(many, cache, language="de")(noise(0.3))).token_ids
    with pytest.raises(UsageError, match="'xx'"):
        Transcriber(many, cache, language="xx")
    assert families.from_json(json.loads(json.dumps(many.config.to_json()))) == many.config


def test_files_that_say_nothing_of_times_or_wrong_things(pair):
    theirs, _ = pair
    values = theirs.config.to_dict()
    silent = families.from_hf(values, {"decoder_start_token_id": 91, "eos_token_id": END}, "x")
    with pytest.raises(ConfigError, match="no_timestamps_token_id"):
        silent.begin(None, timed=False)
    old = GENERATION | {"forced_decoder_ids": [[1, UNTIMED]]}
    assert families.from_hf(values, old, "x") == families.from_hf(values, GENERATION, "x")
    for settings, named in (
        ({"no_timestamps_token_id": 157}, "is 157"), ({"lang_to_id": [3]}, "lang_to_id"),
        ({"lang_to_id": {"<|de|>": -1}}, "<|de|>"), ({"no_timestamps_token_id": "a"}, "no_timestamps"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=named.replace("|", r"\|")):
            families.from_hf(values, GENERATION | settings, "x")
    for settings, named in (
        ({"scale_embedding": True}, "scale_embedding"), ({"d_model": 66}, "can't be cut"),
        ({"num_mel_bins": 0}, "num_mel_bins"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=named):
            families.from_hf(values | settings, GENERATION, "x")


def test_sources_that_are_no_features_are_refused(model):
    cache = model.cache("f32", memory=MEMORY)
    for source in ([3, 4], torch.zeros(10, 23), torch.zeros(10, 24, dtype=torch.float64), torch.zeros(24)):
        with pytest.raises(UsageError, match=r"features, f32 \[frames, 24\]"):
            model.fill(cache, source)
    with pytest.raises(UsageError, match="empty"):
        model.fill(cache, torch.zeros(0, 24))
    with pytest.raises(ContextError, match="121 frames is longer than the 120"):
        model.fill(cache, torch.zeros(121, 24))
    with pytest.raises(UsageError, match="kvik transcribe"):
        ask(model, "hello")
    with pytest.raises(UsageError, match="hears nothing"):
        Transcriber(readers.ours(drawn("bart")), cache)


def test_a_second_pass_in_the_same_cache_runs_no_encoder(model, monkeypatch):
    monkeypatch.setattr(transcription, "TEMPERATURES", (0.4,))
    cache = model.cache("f32", memory=MEMORY)
    heard, sound = listening(cache), noise(3)
    first = list(Transcriber(model, cache)(sound))
    filled = [e for e in heard if isinstance(e, events.Filled)]
    assert len(filled) == len(first) >= 3
    again = Transcriber(model, cache)
    assert list(again(sound)) == first and again.encoded == 0
    assert [e for e in heard if isinstance(e, events.Filled)] == filled
    cache.check()
    assert cache.books.in_use == 0


@pytest.mark.parametrize("kv", ["f32", "int8; cross: int4"])
def test_five_beams_hold_one_windows_rows(model, kv, monkeypatch):
    """Everything that open beams hold: the window's rows once, and each beam's own."""
    held, run = [], Model.run

    def counted(self, chunks, **options):
        out = run(self, chunks, **options)
        cache = chunks[0][0].cache
        held.append((len(chunks), len(chunks[0][0]), bytes_in_use(cache) - cache.arena.tables))
        return out

    monkeypatch.setattr(Model, "run", counted)
    monkeypatch.setattr(transcription, "TEMPERATURES", ())
    for count in (1, 5):
        cache = model.cache(kv, memory=MEMORY)
        heard = listening(cache)
        transcriber = Transcriber(model, cache, count=count, timed=True)
        next(transcriber(noise(1)))
        assert [e.rows for e in heard if isinstance(e, events.Filled)] == [60] and transcriber.encoded == 1
    windows, texts = (
        sum(len(g.lanes) * g.page_bytes * -(-rows // 32) for g in cache.spec.groups if g.source == source)
        for source, rows in ((True, 60), (False, 32))
    )
    most = {n: max(used for beams_, length, used in held if beams_ == n and length <= 32) for n in (1, 5)}
    assert (most[1], most[5]) == (windows + texts, windows + 5 * texts), "four more beams: four more texts, no window"
    assert source_bytes(model, cache.spec).payload < windows <= source_bytes(model, cache.spec).allocated
    assert text_bytes(cache.spec, 32).payload <= texts


def test_doubtful_texts_are_drawn_again_and_silence_is_left_out(monkeypatch):
    model = hearer(suppress_tokens=list(range(END, 157)))[1]
    cache = model.cache("f32", memory=MEMORY)
    transcriber, sound = Transcriber(model, cache), noise(1)
    monkeypatch.setattr(transcription, "LEAST_LIKELY", -100.0)
    monkeypatch.setattr(transcription, "MOST_REPEATING", 100.0)
    (plain,) = transcriber(sound)
    assert plain.temperature == 0 and plain.speech and plain.text
    monkeypatch.setattr(transcription, "MOST_REPEATING", 0.0)
    (drawn_again,) = transcriber(sound)
    assert drawn_again.temperature == 1.0 and drawn_again.token_ids != plain.token_ids
    assert [drawn_again] == list(transcriber(sound)), "drawn the same every time"
    monkeypatch.setattr(transcription, "LEAST_LIKELY", 0.0)
    monkeypatch.setattr(transcription, "NO_SPEECH", -1.0)
    (silent,) = transcriber(sound)
    assert not silent.speech and silent.segments == () and silent.seconds == 1.0
    assert cache.books.in_use == 0


def test_a_drawn_texts_score_is_its_mean_logarithm(model):
    cache = model.cache("f32", memory=MEMORY)
    transcriber = Transcriber(model, cache)
    source = model.fill(cache, readers.source(model, 50))
    beam = transcriber._drawn(source, [91, UNTIMED], model.reading.rules(timed=False), 20, 0.001)
    greedy = beams(model, cache, [91, UNTIMED], source=source, count=1, max_tokens=20, early_stopping=True)[0]
    assert beam.token_ids == greedy.token_ids
    assert beam.score == pytest.approx(greedy.score, abs=0.2) and beam.score > greedy.score, "of what may come"


def text(*parts):
    """Token ids from letters and times in hundredths of a second."""
    return [token for p in parts for token in ([ZERO + p // 2] if isinstance(p, int) else [ord(c) - 33 for c in p])]


@pytest.mark.parametrize(
    ("parts", "found", "after"),
    [
        ((0, "ab", 40, 40, "cd", 90), [(0, 0.4, "ab"), (0.4, 0.9, "cd")], 1.1),  # closed: all was heard
        ((0, "ab", 40, 44, "cd", 90, 90), [(0, 0.4, "ab"), (0.44, 0.9, "cd")], 0.9),  # another part begins there
        ((0, "ab", 40, 40, "cd"), [(0, 0.4, "ab")], 0.4),  # cut off: heard again
        ((10, "ab", 60), [(0.1, 0.6, "ab")], 1.1),
        ((10, "ab"), [(0.1, 1.1, "ab")], 1.1),
        (("ab",), [(0, 1.1, "ab")], 1.1),
        ((0, "ab", 120), [(0, 1.1, "ab")], 1.1),  # never behind the end
        ((0, 0, "ab"), [(0, 0, "")], 1.1),  # never on the spot
        ((), [(0, 1.1, "")], 1.1),
    ],
    ids=str,
)
def test_where_parts_lie_and_the_next_window_begins(model, parts, found, after):
    transcriber = Transcriber(model, model.cache("f32", memory=MEMORY))
    got, seconds = transcriber._parts([*text(*parts), END], 1.1)
    assert [(a, b, transcriber._said(p)) for a, b, p in got] == [
        (pytest.approx(a), pytest.approx(b), t) for a, b, t in found
    ]
    assert seconds == pytest.approx(after)


def test_windows_follow_the_times_of_the_last_one(model, monkeypatch):
    said = iter([text(0, "ab", 80, 80, "c"), text(10, "d", 100, 100), text(0, "e", 50)])
    transcriber = Transcriber(model, model.cache("f32", memory=MEMORY))
    monkeypatch.setattr(transcriber, "_text", lambda *_: (Beam((*next(said), END), -0.1), 0.0, True))
    windows = list(transcriber(noise(2.5)))
    assert [(w.start, w.seconds) for w in windows] == [(0, 0.8), (0.8, 1.0), (1.8, pytest.approx(0.7))]
    assert [s.text for w in windows for s in w.segments] == ["ab", "d", "e"]
    assert windows[1].segments[0].start == pytest.approx(0.9)
    assert {len(transcriber._prompts[timed]) for timed in (True, False)} == {1, 2}


def test_subtitles():
    parts = [Segment(0.0, 1.5, "a & b"), Segment(3599.9995, 3661.25, "<c>\nd")]
    assert FORMATS[".srt"](parts) == (
        "1\n00:00:00,000 --> 00:00:01,500\na & b\n\n2\n01:00:00,000 --> 01:01:01,250\n<c> d\n"
    )
    assert FORMATS[".vtt"](parts) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &amp; b\n\n01:00:00.000 --> 01:01:01.250\n&lt;c&gt; d\n"
    )
    assert FORMATS[".txt"](parts) == "a & b\n<c> d\n"


def test_windows_are_of_the_models_own_length(model):
    assert model.reading.frames * HOP / RATE == 1.2
    cache = model.cache("f32", memory=MEMORY)
    (window,) = Transcriber(model, cache)(noise(1.2))
    assert window.seconds == 1.2 and window.segments[0].end == 1.2, "one window, without times"
