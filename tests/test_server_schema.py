"""Requests made from the published schema, valid and not: no answer is a server's mistake."""

import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")
schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")

from kvik.models.model import load  # noqa: E402
from kvik.server.settings import Limits  # noqa: E402
from served import save_tiny, serving  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # schemathesis' are not ours
OPERATIONS = {
    "POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize", "GET /v1/models",
    "GET /v1/models/{name}", "GET /tokenizer_info", "GET /health", "GET /ping", "GET /ready", "GET /readyz",
    "GET /version", "GET /metrics", "GET /kvik/cache", "GET /kvik/requests/{id}",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = load(str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=64)), weights="f32")
    with serving(model, limits=Limits(seconds=20)) as server:
        yield server


def test_no_request_of_the_schema_is_answered_by_5xx(server):
    status, _, published = server.send("/openapi.json")
    assert status == 200 and "422" not in json.dumps([each["responses"] for each in operations(published)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_dict(published)
    found = set()
    for each in schema.get_all_operations():
        operation = each.ok()
        found.add(operation.label)
        modes, posts = schemathesis.GenerationMode, operation.method.upper() == "POST"
        for mode in (modes.POSITIVE, modes.NEGATIVE) if posts else (modes.POSITIVE,):
            try_out(server, operation, mode, 8 if posts else 3)
    assert found == OPERATIONS


def operations(published):
    return [operation for path in published["paths"].values() for operation in path.values()]


def try_out(server, operation, mode, examples):
    statuses = []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def one(case):
        response = case.call(base_url=server.url, timeout=20)
        statuses.append(response.status_code)
        assert response.status_code < 500, (operation.label, response.status_code, case.body, response.text)
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}, response.text

    one()
    assert statuses


@given(
    st.dictionaries(
        st.sampled_from(
            ["n", "temperature", "top_p", "seed", "stop", "top_k", "min_p", "logprobs", "max_tokens", "stream", "echo",
             "min_tokens", "presence_penalty", "repetition_penalty", "logit_bias", "priority", "stop_token_ids",
             "ignore_eos", "structured_outputs", "response_format", "cache_salt", "suffix", "best_of"]
        ),
        st.one_of(
            st.none(), st.booleans(), st.integers(-3, 6), st.integers(), st.floats(), st.text(max_size=5),
            st.lists(st.integers(-1, 300), max_size=3), st.just({"type": "json_object"}), st.just({"regex": "[ab]+"}),
            st.dictionaries(st.sampled_from(["97", "-1", "x"]), st.floats(-200, 200), max_size=2),
        ),
        max_size=6,
    ),
    st.sampled_from(["a", "", ["a", "b"], [1, 2], [[1], [2, 3]], [[-1]], [300], "é" * 70]),
)  # fmt: skip
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_no_mix_of_fields_is_answered_by_5xx(server, fields, prompt):
    status, _, answer = server.send("/v1/completions", {"max_tokens": 4, **fields, "prompt": prompt})
    assert status in (200, 400), (status, answer)
