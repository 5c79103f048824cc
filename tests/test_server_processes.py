"""The server as a process: signals, wrong options, a port that is taken, drafts."""

import os
import select
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")

from served import Client, save_tiny
from test_server_life import CHAT, LONG, SHORT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def started(folder, *options):
    """`kvik serve` in a process of its own, once it answers: the process and a client's port."""
    code = "from kvik.cli import main; main()"
    words = ["serve", str(folder), "--weights", "f32", "--memory", "8MiB", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, env={**os.environ, "KVIK_API_KEY": ""}
    )
    if not select.select([process.stderr], [], [], 150)[0]:  # a machine under load takes its time
        process.kill()
        process.communicate()
        pytest.fail("it says nothing")
    while "http://" not in (line := process.stderr.readline()):
        assert line, "it ended before it answered"
    return process, int(line.split("/v1")[0].rsplit(":", 1)[1]), line


def test_a_killed_server_leaves_nothing_to_clean(folder):
    process, port, line = started(folder, "--port", "0", "--served-model-name", "tiny")
    assert "tiny at http://127.0.0.1:" in line and "8.0 MiB" in line and "1,024 tokens" in line and "no API key" in line

    class At(Client):
        def __init__(self):
            self.url, self.port = f"http://127.0.0.1:{port}", port

    sock = At().raw(LONG)
    assert sock.recv(100)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stderr.close()
    again, _, _ = started(folder, "--port", str(port))
    assert At().send(CHAT, SHORT)[2]["usage"]["completion_tokens"] == 3
    again.send_signal(signal.SIGTERM)
    assert again.wait(20) == 0 and again.stderr.read() == ""
    again.stderr.close()
    sock.close()


def test_a_draft_guesses_for_a_server(folder, kvik_here):
    process, _, line = started(folder, "--port", "0", "--draft", str(folder), "--draft-kv", "int4", "--guesses", "3")
    assert f"draft {folder}, int4, 1." in line and "cache bf16, 6." in line
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stderr.close()
    done = kvik_here("serve", str(folder), "--port", "0", "--draft", str(folder), "--kv", "int8+h2o:64rows")
    assert done.returncode == 2 and "can't be taken back" in done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--host", "nowhere.invalid", "--insecure"], "no address"),
        (["--api-key", "a b"], "API key"),
        (["--api-key-file", "/nothing"], "can't be read"),
        (["--kv", "nonsense"], "nonsense"),
        (["--memory", "lots"], "lots"),
        (["--draft-weights", "int4"], "give --draft too"),
        (["--draft", "smollm2", "--draft-kv", "nonsense"], "nonsense"),
        (["--served-model-name", " "], "is empty"),
        (["--api-key-file", "/"], "(Is a directory), so nobody could ask; name a file"),
    ],
)
def test_wrong_options_are_a_line_before_a_model_is_loaded(kvik_here, options, reason):
    done = kvik_here("serve", "/no/model/here", *options)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--memory", "1KiB"], "every request would be refused; give --memory more"),
        (["--max-model-len", "99999"], "--max-model-len 99,999 is more than the 1,024 tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_a_line_before_anybody_asks(folder, kvik_here, options, reason):
    done = kvik_here("serve", str(folder), "--weights", "f32", "--port", "0", *options)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_a_line(kvik_here):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = kvik_here("serve", "/no/model/here", "--port", other.getsockname()[1])
    assert done.returncode == 2 and "choose another --port" in done.stderr


def test_without_the_extra_a_line_says_what_to_install(kvik_here, monkeypatch):
    import importlib.util

    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else honest(name, *a))
    done = kvik_here("serve", "/no/model/here")
    assert done.returncode == 2 and "fastapi" in done.stderr and "pip install 'kvik[serve]'" in done.stderr
