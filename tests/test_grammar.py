"""Answers that follow a grammar, in the engine: alone, together, guessed ahead and preempted."""

import json
import re

import pytest

pytest.importorskip("llguidance", reason="pip install 'kvik[serve]'")

from kvik.engine.engine import Engine
from kvik.engine.grammar import Grammars, Matched
from kvik.engine.paying import Paying
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.errors import EngineError, UsageError
from kvik.models.model import load
from kvik.models.text.tokenizer import Tokenizer
from served import HELLO, WEATHER, save_tiny

SCHEMA = {"type": "array", "items": {"enum": ["ab", "abab", 1, True]}, "minItems": 16, "maxItems": 18}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(save_tiny(tmp_path_factory.mktemp("tiny"))), weights="f32")


@pytest.fixture(scope="module")
def grammars(model):
    return Grammars(model)


def written(model, grammar, memory="4MiB", count=6, **engine):
    with Engine(model, "f32", memory=memory, **engine) as made:
        asked = [
            Request(list(b"give a list " * (1 + at % 3)), 250, sampling=Sampling(2.0, seed=at), n=2, grammar=grammar)
            for at in range(count)
        ]
        streams = [made.submit(each) for each in asked]
        return [answer for stream in streams for answer in stream.answers()], made.counts


def test_every_answer_follows_it_and_ends_with_it(model, grammars):
    answers, _ = written(model, grammars.json(SCHEMA))
    for answer in answers:
        assert answer.finish_reason == "stop" and 16 <= len(json.loads(answer.text)) <= 18
    assert len({answer.text for answer in answers}) > 4


def test_guesses_and_preemption_change_no_token(model, grammars):
    grammar = grammars.json(SCHEMA)
    alone = [answer.token_ids for answer in written(model, grammar, running=2)[0]]
    guessed, counts = written(model, grammar, guesses=4)
    assert [answer.token_ids for answer in guessed] == alone and counts.accepted_tokens > 0
    squeezed, counts = written(model, grammar, memory="1025KiB")
    assert [answer.token_ids for answer in squeezed] == alone and counts.preemptions > 0


def test_a_draft_follows_the_grammar_and_what_it_forbids_is_no_harm(model, grammars, monkeypatch):
    monkeypatch.setattr(Paying, "best", lambda self, answers: self.most)
    grammar = grammars.json(SCHEMA)
    alone = [answer.token_ids for answer in written(model, grammar, running=2, count=3)[0]]
    drafted, counts = written(model, grammar, count=3, draft=model, draft_kv="f32", guesses=4)
    assert [answer.token_ids for answer in drafted] == alone
    assert counts.accepted_tokens > 0.9 * counts.guessed_tokens, "all but what came after an end"
    monkeypatch.setattr(Matched, "copy", lambda self: grammars.regex("(.|\\n)*")())
    forbidden, fewer = written(model, grammar, count=3, draft=model, draft_kv="f32", guesses=4)
    assert [answer.token_ids for answer in forbidden] == alone
    assert fewer.accepted_tokens < 0.5 * fewer.guessed_tokens


def test_an_end_comes_only_where_the_grammar_may_end(model, grammars):
    likes_to_end = Sampling(bias={256: 100.0})
    with Engine(model, "f32", memory="4MiB") as engine:
        answer = engine.submit(Request([5], 50, sampling=likes_to_end, grammar=grammars.regex("abc(d*)"))).answers()[0]
        assert (answer.text, answer.token_ids[-1], answer.finish_reason) == ("abc", 256, "stop")
        forever = Request([5], 20, sampling=likes_to_end, ignore_end=True, grammar=grammars.regex("a*"))
        answer = engine.submit(forever).answers()[0]
        assert re.fullmatch("a{20}", answer.text) and answer.finish_reason == "length"


def test_a_grammar_that_can_not_be_followed_ends_only_its_own_request(model, grammars):
    class Broken(Matched):
        def take(self, token):
            raise EngineError("too complex")

    made = grammars.regex("a+")

    def broken():
        return Broken(made()._matcher, [256])

    with Engine(model, "f32", memory="4MiB") as engine:
        bad = engine.submit(Request([5], 9, grammar=broken))
        good = engine.submit(Request([5], 9, ignore_end=True))
        with pytest.raises(EngineError, match="too complex"):
            bad.answers()
        assert len(good.answers()[0].token_ids) == 9
        engine.asked(engine.cache.check)


@pytest.mark.parametrize(
    ("kind", "text"), [("regex", "("), ("lark", "start: nothing"), ("json", {"type": "nonsense"}), ("json", {"a": {1}})]
)
def test_what_is_no_grammar_is_refused(grammars, kind, text):
    with pytest.raises(UsageError, match="give a valid one"):
        getattr(grammars, kind)(text)


def test_a_grammar_and_min_tokens_may_contradict(grammars):
    with pytest.raises(UsageError, match="min-tokens"):
        Request([5], 9, min_tokens=2, grammar=grammars.regex("a"))


def test_tokens_are_spelled_byte_by_byte(model, tmp_path):
    text = "né <end> ok\n"
    ids = model.tokenizer.encode(text)
    assert b"".join(map(model.tokenizer.spelled, ids)) == text.encode() and len(model.tokenizer.spelled(ids[1])) == 1
    assert model.tokenizer.spelled(10_000) == b""


def test_sentence_pieces_are_spelled_with_their_spaces(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocabulary = {"<unk>": 0, "▁the": 1, "▁": 2, "cat": 3, "<0xC3>": 4, "<0xA9>": 5}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert b"".join(map(tokenizer.spelled, (1, 2, 3, 4, 5))).decode() == " the caté"


def test_a_template_reads_tools_and_options_but_not_in_place_of_messages(model):
    plain = model.tokenizer.chat(HELLO)
    assert "weather" in model.tokenizer.chat(HELLO, tools=[WEATHER]) and "weather" not in plain
    assert model.tokenizer.chat(HELLO, options={"mood": "!", "messages": [], "tools": [1]}) == plain + "!"
