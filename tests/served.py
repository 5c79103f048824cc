"""A tiny random model with a byte tokenizer and a chat template with tools, and a server over it on loopback."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from kvik.engine.engine import Engine
from kvik.server.running import Server, bound
from kvik.server.settings import Settings

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>call as <tool_call>{...}</tool_call>{% endif %}"
    "{% for message in messages %}<turn>{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant: {% endif %}{{ mood }}"
)
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def save_tiny(folder, positions=1024):
    """A model's folder, as transformers saves it."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {"<end>": 256, "<turn>": 257}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<turn>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=positions
    )
    made = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=256))
    made.save_pretrained(folder)
    return folder


class Client:
    """Plain HTTP to a server, for what the openai client would not send."""

    def __init__(self, server, port):
        self.server, self.port, self.url = server, port, f"http://127.0.0.1:{port}"
        self.desk, self.engine = server.desk, server.desk.engine

    def send(self, path, body=None, key=None, headers=(), data=None):
        """(status, headers, body): JSON where it is."""
        given = {"content-type": "application/json", **dict(headers)}
        given |= {} if key is None else {"authorization": f"Bearer {key}"}
        data = data if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=given)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, headers, text = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, headers, text = error.code, error.headers, error.read()
        plain = headers.get("content-type") != "application/json"
        return status, headers, text.decode() if plain else json.loads(text)

    def raw(self, body, path="/v1/chat/completions", buffer=None):
        """A socket on which a request was sent; nothing was read from it."""
        made = socket.socket()
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(20)
        made.connect(("127.0.0.1", self.port))
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        made.sendall(head.encode() + f"content-length: {len(text)}\r\n\r\n".encode() + text)
        return made

    def openai(self, key="none"):
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=30)


def until(met, seconds=20):
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(model, kv="f32", memory=16 << 20, send_buffer=None, engine=None, **settings):
    """A server in a thread; ended, with its engine, on the way out. The cache must add up then."""
    sock = bound("127.0.0.1", 0)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    with sock, Engine(model, kv, memory=memory, **(engine or {})) as made:
        server = Server(made, Settings(**{"names": ("tiny",), **settings}), host="127.0.0.1", log_level="error")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        client = Client(server, sock.getsockname()[1])
        client.thread = thread
        try:
            yield client
        finally:
            server.force_exit = server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            if not made.broken:
                made.asked(made.cache.check)
                until(lambda: not made.running and not made.asked(lambda: made.cache.sequences))
