"""What rows in fewer bits cost, in llama.cpp and in kvik: KL divergence of each engine's predictions from its own over
rows in full precision, on the same tokens and with the weights of the same GGUF file.

    benchmarks/peers_setup                     # once: llama.cpp among others, in .peers
    python benchmarks/precision.py [--tokens 1024] [--texts 2] [--peers .peers] [--json FILE]

Text: `pydoc_data.topics`, from evenly spread places, fed in chunks of 256; every token's prediction counts. llama.cpp
works in a process of its own (`llama_logits.py`), threads on all cores, and is held against its f16 rows with flash
attention; kvik against its f32 rows. Each does so twice: with the file's weights widened to f32, so that nothing but
the rows is rounded, and with the weights as the file has them.

**Floors.** With weights in 4 bits both engines round what goes into a product to 8 bits: the smallest change of a row
flips some of that rounding, and no KL gets below what that shows. So floors stand beside the figures: how far the run
over full rows is from f32 throughout (kvik's f32 weights and rows), and what a change of attention shows that is far
below any rounding to 8 bits (in llama.cpp the same f16 rows without flash attention; in kvik f16 rows for f32 ones).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from torch import Tensor

import kvik
from kvik.eval.measures import Reference
from kvik.eval.words import nats, share

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
BYTES = {"f16": 128, "q8_0": 2 * 34, "q4_0": 2 * 18}  # a row of 64: blocks of 32 codes and an f16 scale
SPECS = ("int8", "int8-rot", "k8v4", "k:int8-rot,v:int4", "int4")
CHUNK = 256
Logits = list[Tensor]  # f32 [tokens, vocabulary] of each text


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        engine: and how it holds weights.
        rows: how keys and values are stored.
        nbytes: of one token in one head, keys and values of 64.
        against: what its predictions are held against.
        mean, p99: KL, nats.
        same: share of tokens whose likeliest successor is the same.
        floor: whether it says what the engine shows without any rounding of rows to fewer bits.
    """

    engine: str
    rows: str
    nbytes: int
    against: str
    mean: float
    p99: float
    same: float
    floor: bool


def compare(full: Logits, other: Logits, texts: list[list[int]]) -> tuple[float, float, float]:
    """(mean KL, 99 % KL, same likeliest) over all tokens of all texts, in f64."""
    kl, same = [], []
    for want, got, tokens in zip(full, other, texts, strict=True):
        assert len(want) == len(got) == len(tokens), "a prediction for each token"
        reference = Reference(want, torch.zeros(len(want), dtype=torch.int64))
        for start in range(0, len(got), CHUNK):
            found = reference.compare(start, got[start : start + CHUNK])
            kl.append(found.kl)
            same.append(found.same)
    values, agree = torch.cat(kl), torch.cat(same)
    return float(values.mean()), float(values.quantile(0.99)), float(agree.double().mean())


def of_kvik(model: kvik.Model, kv: str, texts: list[list[int]]) -> Logits:
    """Teacher forcing, CHUNK tokens at once."""
    found = []
    for tokens in texts:
        with model.cache(kv, shares=False).open() as sequence:
            parts = []
            for start in range(0, len(tokens), CHUNK):
                parts.append(model.run([(sequence, tokens[start : start + CHUNK])], every=True))
                sequence.settle()
        found.append(torch.cat(parts))
    return found


class Llama:
    """llama.cpp's logits, a process for each setting; the files are gone once they are read."""

    def __init__(self, python: Path, gguf: Path, texts: list[list[int]]) -> None:
        self.python, self.gguf, self.texts = python, gguf, texts
        self.version = ""

    def logits(self, k: str, v: str, attention: str = "fused", rotated: bool = True) -> Logits:
        """Over rows of these types."""
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / "tokens.npy"
            np.save(tokens, np.array(self.texts, np.int32))
            command = [self.python, HERE / "llama_logits.py", self.gguf, k, v, attention, tokens, folder]
            environment = os.environ | ({} if rotated else {"LLAMA_ATTN_ROT_DISABLE": "1"})
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"llama.cpp with {k}/{v} ended: {done.stderr.strip()[-300:]}")
            said = json.loads(done.stdout.splitlines()[-1])
            self.version = said["version"]
            for stream, kind in (("k", k), ("v", v)):
                wanted = rotated and kind.startswith("q")
                assert said["rotated"][stream] == wanted, f"{stream} in {kind}: rotated is {not wanted}"
            return [torch.from_numpy(np.load(Path(folder) / f"{i}.npy")) for i in range(len(self.texts))]


def widened(gguf: Path, target: Path) -> Path:
    """The same model with all weights in f32, for llama.cpp."""
    reader = GGUFReader(gguf)
    writer = GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def llama_rows(llama: Llama, weights: str, f32: Logits) -> Iterator[Row]:
    """Floors, then each pair of types, with llama.cpp's rotation and without."""
    full = llama.logits("f16", "f16")
    engine = f"llama.cpp, {weights} weights"

    def row(k: str, v: str, rows: str, got: Logits, want: Logits = full, against: str = "its f16 rows") -> Row:
        return Row(engine, rows, BYTES[k] + BYTES[v], against, *compare(want, got, llama.texts), k == "f16")

    yield row("f16", "f16", "f16", full, f32, "f32 throughout")
    yield row("f16", "f16", "f16, no flash attention", llama.logits("f16", "f16", "apart"))
    for k, v in TYPES:
        yield row(k, v, f"{k}/{v}", llama.logits(k, v))
    for k, v in TYPES:
        yield row(k, v, f"{k}/{v}, not rotated", llama.logits(k, v, rotated=False))


def kvik_rows(gguf: Path, weights: str, texts: list[list[int]], f32: Logits, specs: list[str]) -> Iterator[Row]:
    """Floors, then each spec."""
    model = kvik.load(gguf, weights=weights)  # type: ignore[arg-type]
    full = f32 if weights == "f32" else of_kvik(model, "f32", texts)

    def row(kv: str, got: Logits, want: Logits = full, against: str = "its f32 rows") -> Row:
        size = model.spec(kv).groups[0].layout.row_bytes
        return Row(f"kvik, {weights} weights", kv, size, against, *compare(want, got, texts), kv in ("f32", "f16"))

    if weights != "f32":
        yield row("f32", full, f32, "f32 throughout")
    for kv in ("f16", *specs):
        yield row(kv, of_kvik(model, kv, texts))


def table(rows: list[Row]) -> str:
    """Markdown."""
    out = ["| engine | rows | B a token and head | against | mean KL | 99 % KL | same likeliest |", "|---" * 7 + "|"]
    for row in rows:
        what = f"{row.rows} (floor)" if row.floor else row.rows
        figures = (nats(row.mean), nats(row.p99), share(row.same, 1))
        out.append(f"| {row.engine} | {what} | {row.nbytes} | {row.against} | " + " | ".join(figures) + " |")
    return "\n".join(out)


def main() -> None:
    """Measures, prints the table, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--kv", default="|".join(SPECS), help="kvik's specs, with | between them")
    parser.add_argument("--engines", default="llama.cpp|kvik", help="which of the two")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers")
    parser.add_argument("--gguf", type=Path, help="by default the SmolLM2 beside the engines")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gguf, python = options.gguf or options.peers / GGUF, options.peers / "bin" / "python"
    if not (python.exists() and gguf.exists()):
        raise SystemExit(f"{options.peers} has no llama.cpp or no model; run benchmarks/peers_setup first")
    model = kvik.load(gguf, weights="f32")
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    starts = [number * len(ids) // options.texts for number in range(options.texts)]
    texts = [ids[start : start + options.tokens] for start in starts]
    f32, specs = of_kvik(model, "f32", texts), options.kv.split("|")
    with tempfile.TemporaryDirectory() as folder:
        wide = Llama(python, widened(gguf, Path(folder) / "f32.gguf"), texts)
        own = Llama(python, gguf, texts)
        every = {
            "llama.cpp": (llama_rows(wide, "f32", f32), llama_rows(own, "Q4_1", f32)),
            "kvik": (kvik_rows(gguf, "f32", texts, f32, specs), kvik_rows(gguf, "int4", texts, f32, specs)),
        }
        parts = [part for engine in options.engines.split("|") for part in every[engine]]
        rows = []
        for row in chain.from_iterable(parts):
            rows.append(row)
            print(f"{row.engine}: {row.rows}: mean KL {row.mean:.2e}", file=sys.stderr, flush=True)
    print(table(rows))
    print(f"llama-cpp-python {own.version}; {options.texts} x {options.tokens} tokens")
    if options.json:
        found = {
            "llama_cpp_python": own.version,
            "tokens": options.tokens,
            "texts": options.texts,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
