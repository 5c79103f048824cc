"""lm-eval itself: kvik beside its own `hf` model over the same weights, and the tasks from end to end, offline.
Everything here is left out where lm-eval is not installed (pip install "kvik[lm-eval]" accelerate)."""

import json
import os
import subprocess
import sys

import pytest
import torch

from eval_models import reader
from kvik.eval.lm_eval import adapter, register
from kvik.eval.runs import evaluate
from kvik.eval.scoring import windows
from test_scoring import TEXT, asked

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvik[lm-eval]'")

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and its dependencies' are not ours
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PAIRS = [(TEXT[:n], end) for n in (300, 31, 130) for end in (" dog", " fox jumps", " over the wall")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reader(tmp_path_factory)[0]


def theirs(model, tokenizer, prefix):
    """lm-eval's own model over transformers' model."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(  # its softmax in f64, as ours: in f32 the sum over a text is off by some 3e-6 of itself
        pretrained=model, tokenizer=tokenizer, prefix_token_id=prefix, device="cpu", batch_size=1,
        softmax_dtype="float64",
    )  # fmt: skip


def check_equal(mine, other, pairs, texts, tokens):
    """All three kinds of question; log-likelihoods within 1e-3 nats."""
    ours, hf = mine.loglikelihood([asked(*pair) for pair in pairs]), []
    for pair in pairs:  # one by one: its own batches are padded
        hf += other.loglikelihood([asked(*pair)], disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in hf]
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in hf], abs=1e-3)
    rolled = mine.loglikelihood_rolling([asked(text) for text in texts])
    assert rolled == pytest.approx(other.loglikelihood_rolling([asked(text) for text in texts]), abs=1e-3)
    settings = {"until": ["\n\n"], "max_gen_toks": tokens, "do_sample": False}
    written = mine.generate_until([asked(text, settings) for text, _ in pairs[::3]])
    assert written == other.generate_until([asked(text, dict(settings)) for text, _ in pairs[::3]])


def test_a_tiny_model_equals_lm_evals_own(folder):
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    mine = adapter()(str(folder), "f32", "f32")
    other = theirs(LlamaForCausalLM.from_pretrained(folder), tokenizer, mine.scorer.prefix)
    other._max_length = mine.scorer.longest = 350
    check_equal(mine, other, PAIRS, [TEXT[:100], TEXT], 12)


@pytest.mark.weights
def test_smollm2_equals_lm_evals_own():
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kvik.models.files import prepare
    from kvik.ops.grouped import dense

    mine = adapter()("smollm2", "f32", "f32")
    held, config = prepare.load(prepare.resolve("smollm2")), mine.scorer.model.config
    sizes = dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden, intermediate_size=config.ffn,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps, rope_theta=config.rope.theta,
    )  # fmt: skip
    reference = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    reference.load_state_dict({name: dense(tensor) for name, tensor in held.tensors.items()}, strict=False)
    reference.tie_weights()
    reference.generation_config.eos_token_id = list(config.eos_ids)
    tokenizer = AutoTokenizer.from_pretrained(held.tokenizer_folder)
    other = theirs(reference.eval(), tokenizer, None)
    assert other.prefix_token_id == mine.scorer.prefix and other.max_length == mine.scorer.longest
    text = topics["assignment"]
    pairs = [(text[:n], text[n : n + 40]) for n in (200, 900)] + [("The capital of France is", " Paris")]
    check_equal(mine, other, pairs, [text[:1500]], 8)


def test_a_long_text_has_lm_evals_windows():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for tokens, longest in ((1, 1), (7, 3), (64, 64), (65, 64), (129, 64), (500, 64)):
        text = list(range(1, tokens + 1))
        theirs = [make_disjoint_window(each) for each in get_rolling_token_windows(text, 0, longest, 1)]
        fed = [0, *text]
        mine = [
            (fed[start : stop - scored + 1], text[stop - scored : stop])
            for start, stop, scored in windows(tokens, longest)
        ]
        assert mine == theirs


def test_the_tasks_agree_with_kvik_eval(folder, tmp_path):
    """Word perplexity of lm-eval's table is that of the NLL which kvik measures; over a text cut as kvik eval cuts it,
    so are the nats of a continuation."""
    from lm_eval.tasks import TaskManager

    register()
    (tmp_path / "my.txt").write_text(TEXT)
    model = adapter()(str(folder), "int8", "f32")
    metadata = {"text": str(tmp_path / "my.txt"), "documents": 2, "words": 40}
    manager = TaskManager(include_path=str(tasks_folder()), metadata=metadata)
    found = lm_eval.simple_evaluate(
        model="kvik", model_args=f"model={folder},kv=int8,weights=f32", tasks=["kvik_perplexity"],
        task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip
    from kvik.eval.passages import cut

    documents = cut(TEXT, 2, 40)
    nats = sum(model.scorer.rolling(model.scorer.encode(each)) for each in documents)
    want = torch.tensor(-nats / 80, dtype=torch.float64).exp()
    assert found["results"]["kvik_perplexity"]["word_perplexity,none"] == pytest.approx(float(want), rel=1e-9)
    assert found["config"]["kvik"]["spec"] == "int8"
    ids = model.scorer.encode(TEXT)
    nll = evaluate(model.scorer.model, ids, ["int8"], prefix=150, scored=100, documents=1).measured[-1].nll
    ((nats, _),) = model.loglikelihood([asked(TEXT[:151], TEXT[151:251])])
    assert -nats / 100 == pytest.approx(nll, abs=1e-12)


def tasks_folder():
    from kvik.eval.lm_eval import TASKS

    return TASKS


def command(*arguments, **options):
    line = [sys.executable, "-m", "kvik.eval.lm_eval", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=250, env=os.environ | OFFLINE, **options)


def test_the_command_runs_every_task_offline(folder, tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    done = command(
        "--model", "kvik", "--model_args", json.dumps({"model": str(folder), "kv": "int8+window:128,sinks:4"}),
        "--tasks", "kvik", "--metadata",
        json.dumps({"text": str(tmp_path / "my.txt"), "documents": 1, "words": 60, "places": 2}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for task in ("kvik_choice", "kvik_last_word", "kvik_perplexity", "kvik_recall"):
        assert f"|{task}" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("arguments", "metadata", "named"),
    [
        ("kv=int9", {}, "int9"),
        ("kv=int8", {"text": "/nowhere/my.txt"}, "/nowhere/my.txt"),
    ],
)
def test_a_refusal_ends_the_command_in_one_line(folder, arguments, metadata, named):
    model = ["--model", "kvik", "--model_args", f"model={folder},{arguments}"]
    done = command(*model, "--tasks", "kvik_perplexity", "--metadata", json.dumps(metadata))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kvik: ") and named in last and "Traceback" not in done.stderr


def test_its_own_models_stay_known():
    """It looks for them only where no model is known at all."""
    from lm_eval.api.registry import model_registry

    register()
    assert {"kvik", "local-completions", "hf"} <= set(model_registry.keys())
