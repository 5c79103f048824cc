"""Ten thousand short requests through `kvik serve`: what the server holds as they go by.

    python benchmarks/many.py [--requests 10000] [--clients 16] [--model smollm2] [--memory 128MiB]

Every prompt is new, so the prefixes of old ones must leave. Ten times on the way nobody asks anything, and the server
is looked at: resident memory (smaps_rollup), pages in use (which must be none), and whether free, kept and in use are
all pages. The first look comes when the cache has been full once, as far as requests reach that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI

LOOKS = 10


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    found = re.search(r"^Rss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None, "the kernel says"
    return int(found[1]) << 10


async def ask(client: AsyncOpenAI, model: str, numbers: range) -> None:
    """One client's requests, one after another."""
    for number in numbers:
        prompt = [1 + (number * 7919 + i * i * 31 + 17 * i * number) % 40_000 for i in range(24 + number % 40)]
        answer = await client.completions.create(
            model=model, prompt=prompt, max_tokens=2, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 2, "nobody gets less"


async def run(args: argparse.Namespace, pid: int, url: str) -> None:
    """Asks, and looks."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300.0, max_retries=0) as client:
        each, began = args.requests // LOOKS, time.perf_counter()
        print("| requests | resident, MB | pages in use | kept | free | all |\n|---|---|---|---|---|---|")
        for look in range(LOOKS):
            numbers = range(look * each, (look + 1) * each)
            clients = (ask(client, args.model, numbers[at :: args.clients]) for at in range(args.clients))
            await asyncio.gather(*clients)
            pages = json.load(urllib.request.urlopen(f"{url}/kvik/cache"))["pages"]
            told = [pages[name] for name in ("in_use", "kept", "free", "all")]
            assert told[0] == 0 and sum(told[:3]) == told[3], "the books add up, and nobody holds anything"
            line = " | ".join(f"{count:,}" for count in told)
            print(f"| {(look + 1) * each:,} | {resident(pid) / 1e6:.0f} | {line} |", flush=True)
        print(f"\n{args.requests / (time.perf_counter() - began):.0f} requests a second")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="128MiB")
    parser.add_argument("--port", type=int, default=8737)
    args = parser.parse_args()
    command = [sys.executable, "-m", "kvik.cli", "serve", args.model, "--kv", "int8", "--memory", args.memory]
    server = subprocess.Popen([*command, "--port", str(args.port)], env={**os.environ, "GOMP_SPINCOUNT": "1000"})
    try:
        url = f"http://127.0.0.1:{args.port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/ready").close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        asyncio.run(run(args, server.pid, url))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


if __name__ == "__main__":
    main()
