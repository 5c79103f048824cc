"""What a server does with clients that leave, stop reading, ask too much or have no key."""

import hashlib
import json
import signal
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")

from kvik.errors import EngineError, UsageError
from kvik.models.model import Model, load
from kvik.server.keys import Keys, salt_of
from kvik.server.settings import Limits
from served import HELLO, save_tiny, serving, until

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")


LONG = {"messages": HELLO, "max_tokens": 900, "ignore_eos": True, "stream": True}


SHORT = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True}


CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return load(str(folder), weights="f32")


@pytest.fixture
def slowly(monkeypatch):
    """Every step takes 5 ms more, so that a long answer is still running when something happens."""
    run = Model.run

    def slow(self, *args, **options):
        time.sleep(0.005)
        return run(self, *args, **options)

    monkeypatch.setattr(Model, "run", slow)


def read_all(sock):
    """What comes until the connection ends, or the answer does."""
    data = b""
    with sock:
        while not data.endswith(b"0\r\n\r\n") and (part := sock.recv(1 << 16)):
            data += part
    return data.decode()


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_at_once(model, stream):
    with serving(model) as server:
        sock = server.raw({**LONG, "stream": stream, "n": 2})
        if stream:
            assert sock.recv(100)
        until(lambda: server.engine.counts.new_tokens > 5)
        sock.close()
        until(lambda: not server.desk.busy and not server.engine.running)
        assert server.engine.counts.aborted == 1 and server.engine.counts.new_tokens < 1000
        assert server.send(CHAT, SHORT)[0] == 200


@pytest.mark.usefixtures("slowly")
def test_a_client_that_leaves_while_it_waits_ends_its_request(model):
    with serving(model, engine={"running": 1, "step_tokens": 64}) as server:
        first = server.raw(LONG)
        until(lambda: server.engine.running == 1)
        second = server.raw(LONG)
        until(lambda: server.engine.waiting == 1)
        second.close()
        until(lambda: server.engine.waiting == 0)
        assert server.engine.running == 1 == server.desk.busy
        first.close()


STUCK = {**LONG, "max_tokens": 400, "n": 3, "logprobs": True, "top_logprobs": 5}  # more than all buffers hold


def test_a_client_that_stops_reading_stops_nobody_else(model):
    with serving(model, send_buffer=4096) as server, server.raw(STUCK, buffer=4096) as sock:
        until(lambda: server.engine.running == 1)
        for _ in range(3):
            assert server.send(CHAT, SHORT)[2]["usage"]["completion_tokens"] == 3
        until(lambda: not server.engine.running)
        assert server.engine.counts.new_tokens == 3 * 400 + 9, "it was computed, and nobody waited for its reader"
        assert server.desk.busy == 1, "what is not read is still kept"
        text = read_all(sock)  # it goes on reading
        assert text.count('"finish_reason":"length"') == 3 and "[DONE]" in text
        until(lambda: not server.desk.busy)


def test_a_client_that_stops_reading_is_left_when_its_time_is_over(model, caplog):
    with serving(model, send_buffer=4096, limits=Limits(seconds=1.5)) as server:
        with server.raw(STUCK, buffer=4096) as sock:
            until(lambda: server.desk.busy == 1)
            until(lambda: not server.desk.busy)
            assert "[DONE]" not in read_all(sock), "the connection ends"
        assert server.send("/health")[0] == 200


def test_a_request_that_takes_too_long_is_told_so(model, slowly):
    with serving(model, limits=Limits(seconds=0.3)) as server:
        status, _, body = server.send(CHAT, {**LONG, "stream": False})
        assert (status, body["error"]["code"]) == (408, "timeout")
        status, _, text = server.send(CHAT, LONG)
        events = text.split("\n\n")
        assert status == 200 and json.loads(events[-3][6:])["error"]["code"] == "timeout"
        assert events[-2] == "data: [DONE]"
        until(lambda: not server.engine.running)


def test_a_stream_says_that_it_lives(model, slowly):
    with serving(model, keep_alive_s=0.05, engine={"running": 1, "step_tokens": 64}) as server:
        first = server.raw({**LONG, "max_tokens": 40})
        until(lambda: server.engine.running == 1)
        status, headers, text = server.send(CHAT, {**SHORT, "stream": True})  # waits behind the first
        assert status == 200 and ": still here\n\n" in text and "x-kvik-cached-tokens" not in headers
        assert text.endswith("data: [DONE]\n\n")
        first.close()


KEYS = Keys.of(["alice", "bob"])


def test_who_has_no_key_gets_nothing_but_health(model):
    with serving(model, keys=KEYS) as server:
        for path in (CHAT, "/v1/completions", "/tokenize", "/nothing"):
            for key in (None, "", "alic", "alicee", "Alice", "älice"):
                sent = None if key is None else key.encode().decode("latin-1")
                status, headers, body = server.send(path, SHORT, key=sent)
                assert (status, body["error"]["code"]) == (401, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics", "/kvik/cache", "/kvik/requests/x", "/tokenizer_info"):
            assert server.send(path)[0] == 401 and server.send(path, key="bob")[0] in (200, 404)
        for path in ("/health", "/ready", "/readyz", "/ping", "/version", "/openapi.json"):
            assert server.send(path)[0] == 200
        assert server.send("/v1/models", headers={"authorization": "Basic alice"})[0] == 401
        assert server.send("/kvik/cache", key="bob")[2]["each"] is None, "sequences may be somebody else's"


@pytest.mark.parametrize("share", [False, True])
def test_a_keys_prefixes_are_its_own(model, share):
    body = {"prompt": "z" * 100, "max_tokens": 1}
    with serving(model, keys=KEYS, share_prefixes=share) as server:
        known = []
        for key in ("alice", "alice", "bob", "bob"):
            _, _, answer = server.send("/v1/completions", body, key=key)
            known.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert known == [0, 96, 96 if share else 0, 96]
        mine = f"/kvik/requests/{answer['id']}"
        assert server.send(mine, key="bob")[0] == 200 and server.send(mine, key="alice")[0] == 404


def test_salts_differ_wherever_who_or_what_differs():
    salts = [
        salt_of(who, own, False) for who, own in (("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"))
    ]
    assert len(set(salts)) == len(salts) and salts[0] == ""
    assert salt_of("a", "", True) == "" and salt_of("a", "x", True) == salt_of("b", "x", True)


def test_keys_come_from_options_and_files(tmp_path):
    (tmp_path / "keys").write_text("# ours\none\n\n two \n")
    keys = Keys.of(["three", "one"], tmp_path / "keys")
    assert len(keys.digests) == 3 and keys.tenant("Bearer two") == hashlib.sha256(b"two").hexdigest()
    assert keys.tenant("bearer three") and keys.tenant(None) is None and keys.tenant("Bearer # ours") is None
    assert "one" not in repr(keys)
    (tmp_path / "empty").write_text("# none\n")
    for wrong in (dict(keys=["a b"]), dict(keys=[""]), dict(keys=["ü"]), dict(keys=[], file=tmp_path / "empty")):
        with pytest.raises(UsageError):
            Keys.of(**wrong)
    with pytest.raises(UsageError, match="can't be read"):
        Keys.of([], tmp_path / "nothing")


BIG = 2**31 - 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**SHORT, "n": 129}, "n"),
        (CHAT, {**SHORT, "n": 0}, "n"),
        (CHAT, {**SHORT, "n": BIG}, "n"),
        ("/v1/completions", {"prompt": ["x"] * 65, "n": 2}, "n"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": BIG}, "logprobs"),
        (CHAT, {**SHORT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {**SHORT, "stop": ["x"] * 17}, "stop"),
        (CHAT, {**SHORT, "stop": "x" * 1025}, "stop"),
        (CHAT, {**SHORT, "stop": [""]}, "stop"),
        (CHAT, {**SHORT, "logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        (CHAT, {**SHORT, "logit_bias": {"258": 1}}, "logit_bias"),
        (CHAT, {**SHORT, "logit_bias": {"-1": 1}}, "logit_bias"),
        (CHAT, {**SHORT, "stop_token_ids": [258]}, "stop_token_ids"),
        (CHAT, {**SHORT, "max_tokens": 0}, "max_tokens"),
        (CHAT, {**SHORT, "max_tokens": BIG}, "messages"),
        (CHAT, {"messages": HELLO * 4097}, "messages"),
        (CHAT, {**SHORT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"x": "y" * 70000}}}},
         "response_format"),
        (CHAT, {**SHORT, "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (CHAT, {**SHORT, "functions": [{}]}, "functions"),
        (CHAT, {**SHORT, "best_of": 4}, "best_of"),
        ("/v1/completions", {"prompt": [258]}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {}, "prompt"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, None),
        (CHAT, {**SHORT, "temperature": float("nan")}, "temperature"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_what_is_too_much_or_wrong_is_400(limited, path, body, param):
    before = limited.engine.counts.prompt_tokens
    status, _, answer = limited.send(path, body)
    error = answer["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"} and "detail" not in answer
    assert param is None or error["param"].startswith(param), error
    assert limited.engine.counts.prompt_tokens == before
    until(lambda: not limited.desk.busy)


@pytest.fixture(scope="module")
def limited(model):
    with serving(model, limits=Limits(body_bytes=200_000, upload_s=0.5)) as server:
        yield server


def test_a_body_is_bounded_before_it_is_read(limited):
    assert limited.send(CHAT, data=b"x" * 200_001)[0] == 413
    with socket.create_connection(("127.0.0.1", limited.port)) as sock:  # no length given
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        sock.sendall(b"transfer-encoding: chunked\r\n\r\n" + (b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 8)
        assert b" 413 " in sock.recv(100)
    with socket.create_connection(("127.0.0.1", limited.port)) as sock:  # never whole
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        sock.sendall(b"content-length: 100\r\n\r\n{")
        assert b" 408 " in sock.recv(100)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"null", b"[]", b'{"messages": 1' + b"0" * 5000 + b"}", b"\xff"]
)
def test_what_is_no_json_is_400(limited, data):
    status, _, answer = limited.send(CHAT, data=data or b" ")
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    if data == b"{":
        assert answer["error"]["message"].startswith("the body is no JSON: ") and answer["error"]["param"] is None


def test_web_pages_can_not_reach_a_server_without_keys(limited, model):
    assert limited.send(CHAT, SHORT, headers={"content-type": "text/plain"})[0] == 415
    status, _, answer = limited.send(CHAT, SHORT, headers={"host": "evil.example:8000"})
    assert (status, answer["error"]["code"]) == (403, "host_not_allowed")
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert limited.send("/v1/models", headers={"host": host})[0] == 200
    with serving(model, keys=KEYS) as server:
        assert server.send("/v1/models", key="bob", headers={"host": "models.example"})[0] == 200


def test_paths_and_methods_that_are_not_there(limited):
    for path, body, status in (("/v1/nothing", None, 404), (CHAT, None, 405), ("/health", {}, 405)):
        found, _, answer = limited.send(path, body)
        assert found == status and answer["error"]["message"]


def test_requests_have_names(limited):
    assert limited.send("/health", headers={"x-request-id": "mine-1"})[1]["x-request-id"] == "mine-1"
    assert limited.send("/health", headers={"x-request-id": "a b"})[1]["x-request-id"].startswith("req-")


def test_unknown_fields_are_ignored_and_named_once(limited, caplog):
    for _ in range(2):
        assert limited.send(CHAT, {**SHORT, "store": True, "flavour": "mint"})[0] == 200
    assert [record.getMessage() for record in caplog.records] == [
        "the field 'flavour' is unknown and ignored; this is said once"
    ]


@pytest.mark.usefixtures("slowly")
def test_what_is_full_is_429_and_when_to_come_again(model):
    limits = Limits(requests_per_key=2)
    with serving(model, keys=KEYS, limits=limits, engine={"running": 1, "step_tokens": 64, "waiting": 1}) as server:
        body = {**LONG, "stream": False, "max_tokens": 300}

        def held(key):
            head = (
                f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer {key}\r\n"
            )
            text = json.dumps(body).encode()
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(head.encode() + f"content-length: {len(text)}\r\n\r\n".encode() + text)
            return sock

        first = held("alice")
        until(lambda: server.engine.running == 1)
        second = held("alice")
        until(lambda: server.engine.waiting == 1)
        status, headers, answer = server.send(CHAT, SHORT, key="alice")
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded") and int(headers["retry-after"]) >= 1
        assert server.send("/v1/models", key="alice")[0] == 200, "what costs nothing is not counted"
        third = held("bob")
        until(lambda: server.engine.waiting == 2)
        assert server.send(CHAT, SHORT, key="bob")[2]["error"]["code"] == "queue_full"
        for sock in (first, second, third):
            sock.close()
        until(lambda: not server.desk.busy and not server.engine.running and not server.engine.waiting)
        assert server.send(CHAT, SHORT, key="alice")[0] == 200


@pytest.mark.usefixtures("slowly")
def test_a_full_queue_takes_all_prompts_of_a_request_or_none(model):
    with serving(model, engine={"running": 1, "step_tokens": 64, "waiting": 2}) as server:
        sock = server.raw(LONG)
        until(lambda: server.engine.running == 1)
        many = {"prompt": ["a", "b", "c", "d", "e"], "max_tokens": 2}
        status, headers, answer = server.send("/v1/completions", many)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        until(lambda: server.engine.waiting == 0)
        sock.close()


def test_what_can_never_fit_is_refused_with_both_numbers(model):
    with serving(model, memory=1 << 20) as server:
        status, _, answer = server.send("/v1/completions", {"prompt": "x", "max_tokens": 1000, "n": 8})
        assert (status, answer["error"]["code"]) == (400, "cache_budget_exceeded")
        assert "1,048,576" in answer["error"]["message"]
        assert server.send(CHAT, {"messages": HELLO, "ignore_eos": True, "n": 1})[0] == 200, "as long as there is room"


def test_an_engine_that_breaks_down_is_an_error_and_not_silence(model, monkeypatch):
    def broken(self, *args, **options):
        raise RuntimeError("a bug")

    with serving(model) as server:
        monkeypatch.setattr("kvik.engine.engine.threading.excepthook", lambda *_: None)
        monkeypatch.setattr(Model, "run", broken)
        status, _, answer = server.send(CHAT, SHORT)
        assert status == 503 and "broken down" in answer["error"]["message"]
        for path in ("/health", "/ready", "/kvik/cache", "/metrics"):
            assert server.send(path)[0] == 503
        assert server.send(CHAT, SHORT)[0] == 503
        with pytest.raises(EngineError):
            server.engine.asked(lambda: 1)


@pytest.mark.usefixtures("slowly")
def test_the_first_sigterm_drains(model):
    with serving(model) as server:
        sock = server.raw({**LONG, "max_tokens": 60})
        until(lambda: server.engine.counts.new_tokens > 3)
        server.server.handle_exit(signal.SIGTERM, None)
        status, headers, answer = server.send(CHAT, SHORT)
        assert (status, answer["error"]["code"]) == (503, "draining") and headers["retry-after"]
        assert server.send("/ready")[0] == 503 and server.send("/health")[0] == 200
        text = read_all(sock)
        assert '"finish_reason":"length"' in text and "[DONE]" in text and '"error"' not in text
        server.thread.join(10)
        assert not server.thread.is_alive() and not server.server.interrupted


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,), (signal.SIGTERM,)])
def test_a_second_sigterm_ctrl_c_or_time_ends_what_runs(model, signals):
    with serving(model, drain_s=30 if len(signals) == 2 else 0.2) as server:
        sock = server.raw(LONG)
        until(lambda: server.engine.counts.new_tokens > 3)
        for each in signals:
            server.server.handle_exit(each, None)
        text = read_all(sock)
        assert '"code":"shutdown"' in text and "[DONE]" in text
        server.thread.join(10)
        assert not server.thread.is_alive() and server.server.interrupted == (signals[0] == signal.SIGINT)
