"""Keys hidden in long texts: where they lie, when an answer is right, and what of them is retained."""

import math

import pytest
import torch

from eval_models import reader
from kvik.errors import UsageError
from kvik.eval.ledger import Ledger
from kvik.eval.needles import DEPTHS, DIGITS, Answer, Needles, ask_all, haystacks
from kvik.models.model import Model


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A tiny model with a tokenizer."""
    return reader(tmp_path_factory)[1]


def test_keys_lie_at_their_depths_and_questions_come_after(reading):
    texts = haystacks(reading.tokenizer, 700)
    assert [(each.kind, each.length, len(each.questions)) for each in texts[:6]] == [
        *(("passkey", 512, 1) for _ in DEPTHS), ("keys", 512, 5),
    ]  # fmt: skip
    assert {each.length for each in texts} == {512, 636} and len(texts) == 12
    for each in texts:
        words = reading.tokenizer.decode(each.tokens)
        assert each.length - 40 < len(each.tokens) <= each.length
        for question in each.questions:
            answer = reading.tokenizer.decode(question.answer)
            assert len(answer.strip()) == DIGITS and answer.strip().isdecimal() and words.count(answer.strip()) == 1
            asked = reading.tokenizer.decode(question.tokens)
            assert asked not in words and f"{asked.split('? ')[1]}{answer}. Remember it." in words
            if each.kind == "passkey":
                place = words.index(answer) / len(words)
                assert abs(place - question.depth) < 0.25, (place, question.depth)
    assert haystacks(reading.tokenizer, 700) == texts
    with pytest.raises(UsageError, match="needles"):
        haystacks(reading.tokenizer, 300)


def test_an_answer_is_right_where_greedy_decoding_says_it(reading, monkeypatch):
    """A model that knows all answers but those to questions about David."""
    texts = [each for each in haystacks(reading.tokenizer, 700) if each.length == 512]
    honest, heard = Model.run, []

    def run(self, chunks, every=False, watch=None):
        sequence, tokens = chunks[0]
        before = len(sequence)
        logits = honest(self, chunks, every, watch)
        if every:
            asked = next(each for each in texts if list(each.tokens) == sequence.tokens[:before]).questions
            question = next(each for each in asked if tuple(tokens[: len(each.tokens)]) == each.tokens)
            heard.append(before)
            sure = 3.0 if "David" in reading.tokenizer.decode(question.tokens) else 9.0
            logits = torch.zeros_like(logits)
            logits[:, 0] = 5.0
            last = len(tokens) - len(question.answer) + 1
            logits[range(last - 1, len(tokens)), list(question.answer)] = sure
        return logits

    monkeypatch.setattr(Model, "run", run)
    monkeypatch.setattr("kvik.eval.needles.haystacks", lambda *_: texts)
    found = ask_all(reading, [reading.spec("f32")], Ledger(), lambda *_: None)
    answers = found.answers[0]
    assert heard == [len(text.tokens) for text in texts for _ in text.questions], "each hears the text alone"
    assert [(each.kind, each.depth, each.right) for each in answers] == [
        *(("passkey", depth, True) for depth in DEPTHS),
        *(("keys", depth, depth != 0.75) for depth in DEPTHS),
    ]
    others = 256 + math.exp(5.0)
    wanted = (DIGITS + 1) * (9 - math.log(others + math.exp(9.0))) / DIGITS
    assert answers[0].log_probability == pytest.approx(wanted)


def test_what_is_retained_is_of_what_the_full_cache_answers():
    def answers(*rights):
        return tuple(Answer("passkey", 512, depth, right, -1.0) for depth, right in zip(DEPTHS, rights, strict=True))

    full, some, none = answers(1, 1, 0, 1, 1), answers(1, 0, 1, 1, 0), answers(0, 0, 0, 0, 0)
    found = Needles(("f32", "int4", "int8"), (full, some, none))
    assert [found.retained(spec) for spec in found.specs] == [1.0, 0.5, 0.0]
    assert [found.right(spec) for spec in found.specs] == [4, 3, 0]
    assert found.probability("int4") == pytest.approx(math.exp(-1))
    assert Needles(("f32", "int4"), (none, full)).retained("int4") is None


def test_needles_are_asked_under_every_spec_and_resumed(reading, tmp_path, monkeypatch):
    specs = [reading.spec(kv) for kv in ("f32", "f32+window:700", "f32+snapkv:25%,every:16")]
    found = ask_all(reading, specs, Ledger(tmp_path / "done.jsonl"), lambda *_: None)
    full, same, small = found.answers
    assert same == full != small and len(full) == 20
    monkeypatch.setattr(Model, "run", lambda *_, **__: pytest.fail("asked again"))
    assert ask_all(reading, specs, Ledger(tmp_path / "done.jsonl"), lambda *_: None) == found
