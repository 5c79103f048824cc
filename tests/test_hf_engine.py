"""Transformers models in kvik's own engine: the same tokens, whatever else is in a step; refused where they can't."""

import json
import re

import pytest
import torch

import bench_models
from hf_models import DECODERS, made
from kvik.engine.engine import Engine
from kvik.engine.request import Request
from kvik.errors import ConfigError, ModelError, UsageError, WeightsError
from kvik.fuzz import Sizes, fuzz, make
from kvik.hf import TransformersModel
from kvik.hf.decoder import Over
from kvik.hf.model import load

REFUSED = {
    "gptj": "Handle", "codegen": "Handle", "gpt_neo": "Handle", "falcon": "Handle", "falcon_alibi": "Handle",
    "bloom": "Handle", "mpt": "Causal", "deepseek_v2": "Handle", "deepseek_v3": "Handle", "xglm": "Handle",
    "llama4": "mask says 6", "jamba": "recurrent states", "lfm2": "recurrent states",
}  # fmt: skip
PROMPTS = [[(7 * i + 11 * j) % 150 + 1 for i in range(5 + 15 * j)] for j in range(4)]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def alone(model, prompt, count=8):
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0][len(prompt) :].tolist()


@pytest.mark.parametrize("name", DECODERS)
def test_answers_of_an_engine_are_those_of_generate_or_the_model_is_refused(name):
    theirs = made(name)
    if name in REFUSED:
        with pytest.raises(ModelError, match=f"many texts in one row .*{REFUSED[name]}.*use it with generate"):
            TransformersModel(theirs)
        assert not theirs.get_decoder()._forward_pre_hooks, "nothing is left on it"
        return
    model = TransformersModel(theirs)
    wanted = [alone(theirs, prompt) for prompt in PROMPTS]
    with Engine(model, "f32", memory="32MiB", step_tokens=24, running=3, guesses=2) as engine:
        for _ in range(2):  # the second time prompts are known
            asked = [engine.submit(Request(prompt, max_tokens=8, ignore_end=True)) for prompt in PROMPTS]
            assert [stream.answers()[0].token_ids for stream in asked] == wanted
        engine.check()
        assert engine.counts.cached_tokens >= 64


def test_a_model_whose_rows_go_astray_is_refused(monkeypatch):
    honest = Over.append
    monkeypatch.setattr(Over, "append", lambda self, layer, k, v: honest(self, layer, k.flip(2), v))
    with pytest.raises(ModelError, match="states differ by"):
        TransformersModel(made("llama"))


def test_what_rounds_by_batch_stays_within_a_bound_under_pressure():
    model = TransformersModel(made("qwen3"), name="tiny")
    trace = make(16, 3, 150, Sizes(longest=200, waiting=12, answers=6, beginnings=(0, 32, 33)))
    report = fuzz(model, trace, ("int8",), memory=1 << 20, bound=1e-3, name="tiny", seconds=30.0)
    assert report.wrong == [] and report.rows[0].verdict.compared > 8


def test_the_command_line(tmp_path, kvik_here):
    folder = bench_models.write_model(tmp_path / "model")
    options = ["run", "--raw", "--model", folder, "--max-tokens", "9", "--json", "rain"]
    ours, theirs = (kvik_here(*options, "--kv", "f32", "--backend", each) for each in ("kvik", "transformers"))
    assert theirs.returncode == 0, theirs.stderr
    a, b = json.loads(ours.stdout), json.loads(theirs.stdout)
    assert b["token_ids"] == a["token_ids"] and b["weights"] == "f32" and not theirs.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--backend", "jax"], "--backend jax: there are kvik and transformers"),
        (["--backend", "transformers", "--share", "pairs"], "--share pairs: .*leave out --backend or --share"),
    ],
)
def test_wrong_options_are_a_line(options, why, kvik_here):
    done = kvik_here("run", *options, "hello")
    assert done.returncode == 2 and re.search(why, done.stderr) and len(bench_models.told(done.stderr)) == 1


def test_folders_that_transformers_can_not_load_are_refused(tmp_path):
    with pytest.raises(UsageError, match="weights int4: transformers holds them in f32 or bf16"):
        load(tmp_path, weights="int4")
    with pytest.raises(ConfigError, match=r"config.json: is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"kvik": {}}')
    with pytest.raises(WeightsError, match=r"its config.json is incomplete"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="transformers can't load it"):
        load(tmp_path)
