"""Log-likelihoods of texts: the same figures as `kvik eval`, whatever is scored beside them; and tasks made of a text.
What needs no lm-eval; `test_lm_eval.py` holds the same beside lm-eval itself."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from eval_models import reader
from kvik.engine.generation import Request
from kvik.errors import UsageError
from kvik.eval import passages
from kvik.eval.lm_eval import Harness, main, register, request_of
from kvik.eval.runs import evaluate
from kvik.eval.scoring import Scorer, windows

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards quietly mix their potions. " * 6
SPECS = ["f32", "int8", "k8v4", "int4+window:64,sinks:4", "int8+snapkv:25%", "int8+keydiff:96rows,every:32"]


@pytest.fixture(scope="module")
def folder_and_model(tmp_path_factory):
    return reader(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(folder_and_model):
    return folder_and_model[0]


@pytest.fixture(scope="module")
def model(folder_and_model):
    return folder_and_model[1]


def direct(model, ids):
    """f64 [T, V]: log-probabilities over full rows, in one step."""
    with model.cache("f32", shares=False).open() as sequence:
        return model.run([(sequence, ids)], every=True).double().log_softmax(dim=-1)


def asked(*args):
    return SimpleNamespace(args=args)


# What is scored.


@pytest.mark.parametrize("kv", SPECS)
def test_a_continuation_has_the_nll_of_kvik_eval(model, kv):
    """The prefix is the prompt, and its last token is followed by what is scored."""
    ids, prefix, scored = model.tokenizer.encode(TEXT), 200, 100
    found = evaluate(model, ids, [kv], prefix=prefix, scored=scored, documents=1).measured[-1]
    assert found.spec == str(model.spec(kv))
    scorer, text = Scorer(model, kv), TEXT[: prefix + scored + 1]
    ((_, nats, _),) = scorer.score([scorer.pair(text[: prefix + 1], text[prefix + 1 :])])
    assert -nats / scored == pytest.approx(found.nll, abs=1e-12)


@pytest.mark.parametrize("kv", ["f32", "int8+snapkv:25%"])
def test_what_is_scored_beside_it_moves_no_bit(model, kv):
    pairs = [(TEXT[:n], end) for n in (40, 130, 131, 260) for end in (" dog", " fox jumps", " over the wall")]
    alone = []
    for pair in pairs:
        scorer = Scorer(model, kv)
        ((_, *answer),) = scorer.score([scorer.pair(*pair)])
        alone.append(answer)
    scorer = Scorer(model, kv)
    together = {number: answer for number, *answer in scorer.score([scorer.pair(*pair) for pair in pairs])}
    assert [together[number] for number in range(len(pairs))] == alone


def test_a_spec_is_felt_from_the_first_token_on(model):
    """Else an answer of one letter would be scored over rows that the spec has dropped."""
    context = TEXT[:300]
    nats = []
    for kv in ("int8", "int8+snapkv:25%"):
        scorer = Scorer(model, kv)
        nats += [each[1] for each in scorer.score([scorer.pair(context, "A")])]
    assert nats[0] != nats[1]


def test_a_whole_text_is_scored_token_by_token(model):
    scorer = Scorer(model, "f32")
    ids = scorer.encode(TEXT[:200])
    want = direct(model, [scorer.prefix, *ids])[:-1].gather(1, torch.tensor(ids)[:, None]).sum()
    assert scorer.rolling(ids) == pytest.approx(float(want), abs=1e-6)


def test_a_text_longer_than_what_is_fed_is_scored_in_windows(model):
    scorer, ids = Scorer(model, "f32", longest=64), model.tokenizer.encode(TEXT[:150])
    fed, want = [scorer.prefix, *ids], 0.0
    for start, stop, scored in [(0, 64, 64), (64, 128, 64), (86, 150, 22)]:
        nats = direct(model, fed[start:stop]).gather(1, torch.tensor(ids[start:stop])[:, None])
        want += float(nats[-scored:].sum())
    assert scorer.rolling(ids) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("tokens", "longest"), [(1, 1), (7, 3), (64, 64), (65, 64), (129, 64), (500, 64)])
def test_windows_score_each_token_once(tokens, longest):
    ends = []
    for start, stop, scored in windows(tokens, longest):
        assert 0 <= start < stop and 1 <= scored <= stop - start <= longest
        assert stop - start == min(longest, tokens)
        ends += range(stop - scored, stop)
    assert ends == list(range(tokens))


def test_greedy_is_what_the_model_would_write(model):
    scorer = Scorer(model, "f32")
    ids = scorer.encode(TEXT[:120])
    written = []
    for _ in range(8):
        written.append(int(direct(model, ids + written)[-1].argmax()))
    other = [*written[:4], (written[4] + 1) % 258, *written[5:]]
    answers = {number: greedy for number, _, greedy in scorer.score([(ids, written), (ids, other)])}
    assert answers == {0: True, 1: False}


def test_of_a_context_that_is_too_long_the_end_stays(model):
    scorer, ids = Scorer(model, "f32", longest=48), model.tokenizer.encode(TEXT[:100])
    target = model.tokenizer.encode(" and more")
    ((_, nats, _),) = scorer.score([(ids, target)])
    context = ids[len(target) - 49 :]
    want = direct(model, [*context, *target][:48])[-len(target) :].gather(1, torch.tensor(target)[:, None]).sum()
    assert nats == pytest.approx(float(want), abs=1e-6)


def test_texts_are_cut_where_the_context_ends(model):
    scorer = Scorer(model, "f32")
    encode = model.tokenizer.encode
    assert scorer.pair("ab ", "cd") == (encode("ab"), encode(" cd"))
    assert scorer.pair("", "cd") == ([scorer.prefix], encode("cd"))
    first = model.tokenizer.decode([scorer.prefix])
    assert scorer.pair("", first + "cd") == ([scorer.prefix], encode("cd"))


# What is generated.


def test_settings_of_a_task_become_a_request(model):
    scorer = Scorer(model, "f32", longest=100)
    request = request_of(scorer, TEXT, {"until": ["\n", ""], "max_gen_toks": 30, "do_sample": False, "temperature": 1})
    assert request == Request(scorer.encode(TEXT)[-70:], 30, ("\n",), request.sampling)
    assert request.sampling.temperature == 0
    assert request_of(scorer, "", {"until": "x", "max_tokens": 5, "top_p": None}).prompt == [scorer.prefix]
    with pytest.raises(UsageError, match="top-p 0"):
        request_of(scorer, "a", {"temperature": 1, "top_p": 0, "max_tokens": 5})


def test_noise_follows_the_seed_of_torch(model):
    scorer, seeds = Scorer(model, "f32"), []
    for _ in range(2):
        torch.manual_seed(3)
        for _ in range(2):
            settings = {"temperature": 0.8, "top_p": 0.9, "top_k": 5}
            sampling = request_of(scorer, "a", settings).sampling
            assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.9, 5)
            seeds.append(sampling.seed)
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


# The harness, as far as it goes without lm-eval.


def test_answers_come_in_the_order_of_the_questions(folder, model):
    harness, scorer = Harness(str(folder), "int8", "f32"), Scorer(model, "int8")
    pairs = [("b" + TEXT[:50], " x"), ("a" + TEXT[:90], " yes"), ("b" + TEXT[:50], " no")]
    want = [next(iter(scorer.score([scorer.pair(*pair)])))[1:] for pair in pairs]
    reported = {}
    harness.set_cache_hook(SimpleNamespace(add_partial=lambda kind, args, answer: reported.update({str(args): answer})))
    assert harness.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True) == want
    assert [reported[str(pair)] for pair in pairs] == want
    assert harness.loglikelihood_rolling([asked("abc")], disable_tqdm=True) == [scorer.rolling(scorer.encode("abc"))]
    text = harness.generate_until([asked("abc", {"max_gen_toks": 4})], disable_tqdm=True)
    assert text == [scorer.go_on(request_of(scorer, "abc", {"max_gen_toks": 4}))]


def test_a_models_arguments_go_over_lm_evals_settings(folder):
    harness = Harness.create_from_arg_obj({"model": str(folder), "device": "cpu"}, {"device": "cuda", "batch_size": 1})
    assert harness.scorer.model.device.type == "cpu"
    with pytest.raises(UsageError, match="batch size 4"):
        Harness.create_from_arg_obj({"model": str(folder)}, {"batch_size": 4, "device": None})


def test_rows_that_wait_for_a_prompt_are_named(folder, capsys):
    for kv in ("int8", "int8+snapkv:25%"):
        Harness(str(folder), kv).loglikelihood_rolling([asked("abc")], disable_tqdm=True)
    errors = [line for line in capsys.readouterr().err.splitlines() if "rolling" in line]
    assert len(errors) == 1 and "int8+snapkv:25% drops rows when a prompt ends" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kw": "int8"}, "'kw'"),
        ({"kv": "int8+window:512", "sinks:4": ""}, "as JSON"),
        ({"batch_size": 8}, "batch size 8"),
        ({"batch_size": "auto"}, "batch size auto"),
        ({"kv": "int9"}, "int9"),
        ({"max_length": 701}, "701"),
        ({"memory": "much"}, "much"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_a_model_of_lm_eval_cant_be_is_refused(folder, arguments, named):
    from kvik.errors import KvikError

    with pytest.raises(KvikError) as refused:
        Harness(str(folder), **arguments)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_what_cant_be_asked_is_refused(folder):
    harness = Harness(str(folder), max_length=40)
    for call in (
        lambda: harness.loglikelihood([asked("a", "")], disable_tqdm=True),
        lambda: harness.loglikelihood([asked("a", "b" * 41)], disable_tqdm=True),
        lambda: harness.generate_until([asked("a", {"num_beams": 4})], disable_tqdm=True),
        lambda: harness.generate_until([asked("a", {"max_gen_toks": 40})], disable_tqdm=True),
        lambda: harness.apply_chat_template([], add_generation_prompt=False),
        lambda: harness.chat_template("tool_use"),
    ):
        with pytest.raises(UsageError) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_without_lm_eval_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UsageError, match="pip install 'kvik\\[lm-eval\\]'"):
        register()
    with pytest.raises(SystemExit) as stopped:
        main()
    out, errors = capsys.readouterr()
    assert (stopped.value.code, out, len(errors.splitlines())) == (2, "", 1)


def test_importing_it_loads_neither_lm_eval_nor_torch():
    code = "import sys, kvik.eval.lm_eval; print({'torch', 'lm_eval', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The tasks' texts.


def test_documents_are_pieces_of_the_text_as_it_stands():
    text = passages._read(None)
    pieces = passages.cut(text, 8, 300)
    places = [text.index(piece) for piece in pieces]
    assert places == sorted(places) and all(len(piece.split()) == 300 for piece in pieces)
    assert all(a + len(piece) <= b for a, b, piece in zip(places, places[1:], pieces, strict=False))


def test_a_next_word_is_what_comes_next():
    (document,) = passages.cut(passages._read(None), 1, 300)
    rows = passages.next_words(document, 4)
    assert len({row["context"] for row in rows}) == 4
    for row in rows:
        rest = document[len(row["context"]) :]
        assert rest[0].isspace() and rest.split()[0] == row["word"] and len(row["context"]) >= len(document) // 3


def test_one_choice_comes_next():
    pieces = passages.cut(passages._read(None), 3, 200)
    labels = []
    for number in range(3):
        rows = passages.choices(pieces, number, 4)
        assert rows == passages.choices(pieces, number, 4) and len(rows) == 4
        for row in rows:
            rest = pieces[number][len(row["context"]) :].lstrip()
            assert len(set(row["choices"])) == 4
            assert [rest.startswith(each) for each in row["choices"]] == [n == row["label"] for n in range(4)]
            assert {len(each.split()) for each in row["choices"]} == {passages.CHOICE_WORDS}
            labels.append(row["label"])
    assert len(set(labels)) > 1


def test_a_hidden_key_stands_once_before_the_question():
    (document,) = passages.cut(passages._read(None), 1, 100)
    rows = passages.hidden(document)
    for row, depth in zip(rows, passages.DEPTHS, strict=True):
        sentence = passages.KEY.format(row["key"])
        assert row["context"].count(row["key"]) == 1
        assert row["context"].replace(sentence, "") == document + passages.QUESTION
        assert abs(row["context"].index(sentence) / len(document) - depth) < 0.1
    assert len({row["key"] for row in rows}) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: passages.cut("a b c", 2, 2),
        lambda: passages.cut("a b c", 0, 2),
        lambda: passages.choices(["a " * 40], 0, 1),
        lambda: passages._read("/nowhere/my.txt"),
    ],
)
def test_a_text_that_makes_no_task_is_refused(call):
    with pytest.raises(UsageError) as refused:
        call()
    assert "\n" not in str(refused.value)
