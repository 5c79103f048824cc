"""`kvik serve` as clients see it: the real openai client over a server on loopback."""

import json

import pytest

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")
openai = pytest.importorskip("openai", reason="pip install openai")

from kvik.engine.generation import Generation  # noqa: E402
from kvik.engine.paying import Paying  # noqa: E402
from kvik.engine.request import Request  # noqa: E402
from kvik.engine.sampling import Sampling  # noqa: E402
from kvik.models.model import load  # noqa: E402
from served import HELLO, WEATHER, save_tiny, serving  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["S", "M"]}, "sold": {"type": "boolean"}},
    "required": ["size", "sold"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(save_tiny(tmp_path_factory.mktemp("tiny"))), weights="f32")


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def ask(client, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})


def complete(client, prompt, **options):
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    )


def alone(model, ids, tokens, **sampling):
    """What the library itself writes."""
    with model.cache("f32", memory=4 << 20).open() as sequence:
        return Generation(model, Request(ids, tokens, sampling=Sampling(**sampling)), sequence).run()


def test_a_chat_is_what_the_library_writes(model, client):
    prompt = model.tokenizer.encode(model.tokenizer.chat(HELLO))
    answer = ask(client)
    alone_ = alone(model, prompt, 12)
    assert answer.choices[0].message.content == alone_.text
    assert answer.choices[0].finish_reason == alone_.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny" and answer.object == "chat.completion"


def test_seeds_repeat_and_n_are_what_further_seeds_give(client):
    hot = dict(temperature=1.5, seed=7)
    three = [choice.message.content for choice in ask(client, n=3, **hot).choices]
    assert three == [ask(client, temperature=1.5, seed=7 + at).choices[0].message.content for at in range(3)]
    assert len(set(three)) == 3


@pytest.mark.parametrize("usage", [True, False])
def test_chunks_come_in_openais_order(client, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(ask(client, stream=True, n=2, seed=1, temperature=1, **options))
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    if usage:
        last = chunks.pop()
        assert last.choices == [] and last.usage.completion_tokens == 24
        assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    else:
        assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    whole = ask(client, n=2, seed=1, temperature=1)
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert mine[-1].finish_reason == "length" and mine[-1].delta.model_dump(exclude_unset=True) == {}
        assert all(each.finish_reason is None for each in mine[:-1])
        text = "".join(each.delta.content for each in mine[:-1])
        assert text == whole.choices[index].message.content


def test_a_stream_is_events_and_done(server):
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    status, headers, text = server.send("/v1/chat/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(each.startswith("data: {") for each in events[:-2])
    assert headers["x-kvik-cached-tokens"].isdigit()


def test_log_probabilities_of_a_chat_are_the_models_own(model, client):
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    prompt = model.tokenizer.encode(model.tokenizer.chat(HELLO))
    tokens = alone(model, prompt, 12).token_ids
    with model.cache("f32", memory=4 << 20).open() as sequence:
        rows = model.run([(sequence, prompt + tokens)], last=[13])[:-1].log_softmax(-1)
    content = choice.logprobs.content
    assert [each.logprob for each in content] == pytest.approx(
        [float(r[t]) for r, t in zip(rows, tokens, strict=True)], abs=1e-5
    )
    assert b"".join(bytes(each.bytes) for each in content).decode("utf-8", "replace") == choice.message.content
    for each, row in zip(content, rows, strict=True):
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)
    streamed = [chunk.choices[0] for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True)]
    found = [entry for each in streamed if each.logprobs for entry in each.logprobs.content]
    assert [each.logprob for each in found] == [each.logprob for each in content]


def test_a_completion_takes_texts_and_tokens_one_or_several(model, client):
    ids = [model.tokenizer.encode(text) for text in ("first", "second")]
    texts = [choice.text for choice in complete(client, ["first", "second"]).choices]
    assert texts == [alone(model, each, 12).text for each in ids]
    assert [choice.text for choice in complete(client, ids).choices] == texts
    assert complete(client, "second").choices[0].text == complete(client, ids[1]).choices[0].text == texts[1]
    both = complete(client, ["first", "second"], n=2, temperature=1, seed=3)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[2].text == complete(client, "second", temperature=1, seed=3).choices[0].text
    assert both.usage.prompt_tokens == sum(map(len, ids)) and both.usage.completion_tokens == 48


@pytest.mark.parametrize("tokens", [0, 1])
def test_echo_gives_a_prompts_log_probabilities(model, client, tokens):
    """As lm-eval's local-completions asks for them, twice: a hit must not lose any."""
    prompt = model.tokenizer.encode("the cat sat on the mat and on the hat, and that was that")
    with model.cache("f32", memory=4 << 20).open() as sequence:
        rows = model.run([(sequence, prompt)], last=[len(prompt)]).log_softmax(-1)
    want = [float(row[token]) for row, token in zip(rows[:-1], prompt[1:], strict=True)]
    for _ in range(2):
        answer = complete(client, [prompt, prompt], echo=True, logprobs=1, max_tokens=tokens, seed=1234)
        for choice in answer.choices:
            found = choice.logprobs
            assert len(found.tokens) == len(prompt) + tokens == len(found.text_offset)
            assert found.text_offset[: len(prompt) + 1] == list(range(len(prompt) + tokens))
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            assert found.token_logprobs[1 : len(prompt)] == pytest.approx(want, abs=1e-5)
            best = [max(top.values()) for top in found.top_logprobs[1 : len(prompt)]]
            assert best == pytest.approx([float(row.max()) for row in rows[:-1]], abs=1e-5)
            assert choice.text.startswith(model.tokenizer.decode(prompt)) and choice.finish_reason == "length"
        assert answer.usage.completion_tokens == 2 * tokens


def test_a_completion_streams(client):
    whole = complete(client, ["first", "second"], echo=True).choices
    chunks = list(complete(client, ["first", "second"], echo=True, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(each.text for each in mine) == whole[index].text
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + ["length"]


def test_stops_biases_and_extras_reach_the_model(model, client):
    letters = {str(token): 100 for token in model.tokenizer.encode("abcdefghij")}
    hot = dict(max_tokens=40, logit_bias=letters, temperature=2, seed=1)
    text = ask(client, **hot).choices[0].message.content
    stop = text[5:7]
    stopped = ask(client, stop=[stop, "never said"], **hot).choices[0]
    assert stopped.message.content == text[: text.index(stop)] and stopped.finish_reason == "stop"
    (a,) = model.tokenizer.encode("a")
    only = ask(client, logit_bias={str(a): 100}, max_tokens=6)
    assert only.choices[0].message.content == "aaaaaa"
    ended = ask(client, logit_bias={str(a): 100}, extra_body={"stop_token_ids": [a]})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    late = ask(client, logit_bias={str(a): 100}, extra_body={"stop_token_ids": [a], "min_tokens": 3})
    assert late.usage.completion_tokens == 4
    greedy = ask(client, temperature=2, seed=4, extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1})
    assert greedy.choices[0].message.content == ask(client).choices[0].message.content


def test_an_end_tokens_log_probability_is_not_shown(client):
    answer = ask(client, logit_bias={"256": 100}, logprobs=True).choices[0]
    assert (answer.message.content, answer.finish_reason, answer.logprobs.content) == ("", "stop", [])
    ignored = ask(client, logit_bias={"256": 100}, extra_body={"ignore_eos": True})
    assert ignored.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_json_follows_its_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "shirt", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        asked = dict(response_format=form, max_tokens=200, temperature=1, seed=seed, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in ask(client, **asked)]
            text, finish = "".join(each.delta.content or "" for each in chunks), chunks[-1].finish_reason
        else:
            text, finish = (
                ask(client, **asked).choices[0].message.content,
                ask(client, **asked).choices[0].finish_reason,
            )
        found = json.loads(text)
        assert finish == "stop" and found["size"] in ("S", "M") and isinstance(found["sold"], bool) and len(found) == 2


@pytest.mark.parametrize(
    ("outputs", "texts"),
    [
        ({"regex": "(red|green)!"}, {"red!", "green!"}),
        ({"choice": ['say "yes"', "no"]}, {'say "yes"', "no"}),
        ({"grammar": 'start: "a" b\nb: "b" | "c"'}, {"ab", "ac"}),
        ({"json": {"enum": [1, 2]}}, {"1", "2"}),
    ],
)
def test_structured_outputs_follow_theirs(client, outputs, texts):
    chosen = {
        ask(client, temperature=5, seed=seed, extra_body={"structured_outputs": outputs}).choices[0].message.content
        for seed in range(8)
    }
    assert chosen == texts


def test_a_tool_that_must_be_called_is(client):
    answer = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=200, temperature=1, seed=2)
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and call.type == "function"
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    named = {"type": "function", "function": {"name": "weather"}}
    other = {"type": "function", "function": {"name": "other"}}
    one = ask(client, tools=[other, WEATHER], tool_choice=named, max_tokens=200, temperature=1, seed=2)
    assert one.choices[0].message.tool_calls[0].function.name == "weather"
    answered = [
        *HELLO, choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]  # fmt: skip
    assert ask(client, messages=answered, tools=[WEATHER]).usage.prompt_tokens > answer.usage.prompt_tokens


def test_calls_are_found_in_what_a_model_says(client):
    said = r'Well\. <tool_call>\{"name": "weather", "arguments": \{"city": "Oslo"\}\}</tool_call>'
    asked = dict(tools=[WEATHER], max_tokens=200, extra_body={"structured_outputs": {"regex": said}})
    message = ask(client, **asked).choices[0].message
    assert message.content == "Well." and json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True, **asked)]
    assert "".join(each.delta.content or "" for each in chunks) == "Well. "
    calls = [call for each in chunks for call in each.delta.tool_calls or ()]
    assert calls[0].id and calls[0].function.name == "weather" and {call.index for call in calls} == {0}
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Oslo"}
    assert chunks[-1].finish_reason == "tool_calls"
    plain = ask(client, **{**asked, "tool_choice": "none"}).choices[0].message
    assert plain.tool_calls is None and plain.content.endswith("</tool_call>")


def test_templates_read_parts_and_options(server, model):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    _, _, plain = server.send("/tokenize", {"messages": parts})
    assert plain["tokens"] == model.tokenizer.encode(model.tokenizer.chat(HELLO)) and plain["max_model_len"] == 1024
    body = {"messages": HELLO, "chat_template_kwargs": {"mood": "!!", "messages": "mine"}, "max_tokens": 1}
    _, _, answer = server.send("/v1/chat/completions", body)
    assert answer["usage"]["prompt_tokens"] == plain["count"] + 2


def test_tokens_and_back(server):
    _, _, found = server.send("/tokenize", {"prompt": "né", "return_token_strs": True})
    assert found["count"] == 3 and found["token_strs"][0] == "n"
    assert server.send("/detokenize", {"tokens": found["tokens"]})[2] == {"prompt": "né"}
    _, _, info = server.send("/tokenizer_info")
    assert info["eos_token"] == "<end>" and info["vocab_size"] == 258


def test_who_is_served(client):
    (card,) = client.models.list().data
    assert (card.id, card.owned_by, card.max_model_len) == ("tiny", "kvik", 1024)
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("wrong", "kind", "status", "code"),
    [
        ({"model": "gpt"}, openai.NotFoundError, 404, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, 400, "invalid_value"),
        ({"temperature": -1}, openai.BadRequestError, 400, "invalid_value"),
        ({"max_tokens": 2000}, openai.BadRequestError, 400, "context_length_exceeded"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, 400, "invalid_value"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, openai.BadRequestError, 400, "invalid_value"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, openai.BadRequestError, 400, "invalid_value"),
        ({"tool_choice": "required"}, openai.BadRequestError, 400, "invalid_value"),
    ],
)
def test_errors_are_the_clients_own(client, wrong, kind, status, code):
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            ask(client, stream=stream, **wrong)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.body["type"] == "invalid_request_error" and caught.value.body["message"]


def test_a_prompt_that_is_too_long_hears_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"1024 tokens.*1033") as caught:
        complete(client, "x" * 1021)
    assert caught.value.code == "context_length_exceeded"


def test_what_was_known_is_told_and_why(server, client):
    text = [{"role": "user", "content": "a" * 90}]
    body = {"messages": text, "max_tokens": 2, "cache_salt": "x"}
    _, headers, first = server.send("/v1/chat/completions", body)
    assert headers["x-kvik-cached-tokens"] == "0"
    again = [{"role": "user", "content": "a" * 80 + "b" * 10}]
    second = ask(client, messages=again, extra_body={"cache_salt": "x"})
    assert second.usage.prompt_tokens_details.cached_tokens == 87
    third = ask(client, messages=again, extra_body={"cache_salt": "y"})
    assert third.usage.prompt_tokens_details.cached_tokens == 0, "another salt"
    why = [server.send(f"/kvik/requests/{each}")[2] for each in (first["id"], second.id, third.id)]
    assert [each["cached_tokens"] for each in why] == [0, 87, 0] and all(each["status"] == "done" for each in why)
    assert "none of your earlier requests" in why[0]["prompts"][0]["why"]
    reason = why[1]["prompts"][0]["why"]
    assert first["id"] in reason and "the first 87 tokens; token 87 is another" in reason
    assert server.send("/kvik/requests/chatcmpl-none")[0] == 404


def test_a_snapshot_adds_up(server):
    _, _, found = server.send("/kvik/cache")
    pages = found["pages"]
    assert pages["all"] == pages["free"] + pages["in_use"] + pages["kept"] > 0
    assert found["payload_bytes"] + found["overhead_bytes"] == found["allocated_bytes"]
    assert found["allocated_bytes"] + found["unused_bytes"] == found["budget_bytes"] == 16 << 20


def test_figures_for_prometheus(model):
    with serving(model, vllm_names=True) as server:
        server.send("/v1/completions", {"prompt": "x" * 70, "max_tokens": 3, "ignore_eos": True})
        server.send("/v1/completions", {"prompt": "x" * 70, "max_tokens": 3, "ignore_eos": True})
        status, headers, text = server.send("/metrics")
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert status == 200 and headers["content-type"].startswith("text/plain")
        assert lines["kvik_prompt_tokens_total"] == "140.0" and lines["kvik_cached_prompt_tokens_total"] == "64.0"
        assert lines["kvik_new_tokens_total"] == "6.0" and lines["kvik_first_token_seconds_count"] == "2.0"
        assert lines['vllm:prefix_cache_hits_total{engine="0",model_name="tiny"}'] == "64.0"
        assert lines['kvik_answers_total{reason="length"}'] == "2.0" and "_created" not in text


def test_a_drafts_guesses_and_its_cache_are_in_the_figures(model, monkeypatch):
    monkeypatch.setattr(Paying, "best", lambda self, answers: self.most)
    with serving(model, engine={"draft": model, "draft_kv": "f32", "guesses": 3}) as server:
        server.send("/v1/completions", {"prompt": "x" * 70, "max_tokens": 13, "ignore_eos": True})
        lines = dict(line.rsplit(" ", 1) for line in server.send("/metrics")[2].splitlines() if line[0] != "#")
        found = server.send("/kvik/cache")[2]["draft"]
    assert lines["kvik_guessed_tokens_total"] == lines["kvik_accepted_tokens_total"] == "9.0"
    assert float(lines["kvik_draft_cache_budget_bytes"]) == found["budget_bytes"] == 8 << 20
    assert float(lines["kvik_draft_cache_held_bytes"]) == found["allocated_bytes"] > 0
    assert found["sequences"] == 0 and found["spec"] == "f32"
