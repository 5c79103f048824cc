"""transformers models in kvik's engine: many ragged texts, the tokens that `generate()` gives each alone."""

import json

import pytest
import torch

import kvik.hf
from hf_models import made
from kvik.engine.engine import Engine
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def prompts():
    return [torch.randint(3, 150, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 23, 40, 1)]


@pytest.mark.parametrize("name", ["starcoder2", "phi", "gemma2", "gpt_oss", "cohere2", "gpt2", "gemma3n"])
def test_ragged_texts_get_the_tokens_that_each_gets_alone(name):
    theirs = made(name)
    model = kvik.hf.Borrowed(theirs)
    with Engine(model, "f32", memory=16 << 20) as engine:
        requests = [Request(text, 8, sampling=Sampling(temperature=0.0), ignore_end=True) for text in prompts()]
        streams = [engine.submit(request) for request in requests]
        found = [stream.answers()[0].token_ids for stream in streams]
    for text, tokens in zip(prompts(), found, strict=True):
        expected = theirs.generate(
            torch.tensor([text]), max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=True
        )
        assert list(tokens) == expected[0, len(text) :].tolist()


def test_a_model_that_it_can_not_run_is_refused_in_a_line():
    for name, words in (("bloom", "reads pages"), ("jamba", "layers of"), ("t5", "reads a source")):
        with pytest.raises(ModelError, match=words) as caught:
            kvik.hf.Borrowed(made(name))
        assert "\n" not in str(caught.value) and "use kvik.hf.Cache" in str(caught.value)


@pytest.mark.weights
def test_run_answers_with_transformers_network(kvik_here):
    line = ["run", "--raw", "The capital of France is", "--max-tokens", "4", "--json", "--kv", "int8"]
    done = [kvik_here(*line, *more) for more in (("--backend", "transformers"), ("--weights", "f32"))]
    assert not any(each.returncode for each in done), done[0].stderr
    assert len({json.loads(each.stdout)["text"] for each in done}) == 1
    refused = kvik_here(*line, "--backend", "transformers", "--weights", "int8")
    assert refused.returncode == 2 and "leave out --weights" in refused.stderr
