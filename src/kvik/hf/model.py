"""A transformers model in kvik's own engine, server and command line: for families that kvik has no code of.

    model = kvik.hf.TransformersModel(AutoModelForCausalLM.from_pretrained(folder), kvik.Tokenizer(folder))
    with Engine(model, "int8", memory="1GiB") as engine:
        print(engine.generate(["Why is the sky blue?"])[0].text)

Everything but the network is kvik's: pages, prefixes, batches, guesses, retention. Products are torch's, and round by
how many rows they have: an answer may differ from the same answer alone in its last bits, and where two tokens are
about as likely, from there on. `kvik fuzz --backend transformers --kv f32 --bound 1e-3` shows by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from kvik.errors import KvikError, ModelError, UsageError
from kvik.hf.decoder import TransformersDecoder
from kvik.hf.fingerprint import fingerprint
from kvik.models.config import Config
from kvik.models.files.folder import read_json
from kvik.models.in_transformers import in_transformers
from kvik.models.model import Model, Weights
from kvik.models.text.tokenizer import Tokenizer
from kvik.ops.linear import Format

_HELD: dict[torch.dtype, Format] = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class TransformersConfig(Config):
    """The sizes of a transformers model, whatever its family."""

    family: ClassVar[str] = "transformers"


class TransformersModel(Model):
    """See the module's docstring."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer | None = None, *, name: str = "") -> None:
        """
        Args:
            model: one for causal text, in f32 or bf16, on one device. It is put into evaluation mode.
            name: for people; by default that of its class.

        Raises:
            ModelError: see `TransformersDecoder`; or it is in another type.
        """
        if model.dtype not in _HELD:
            raise ModelError(
                f"{type(model).__name__} is in {model.dtype}; load it with dtype=torch.bfloat16 or float32"
            )
        decoder = TransformersDecoder(model)
        computed = f"transformers {transformers.__version__}, {decoder.found.attention}, torch {torch.__version__}"
        config = _config(model, decoder, name or type(model).__name__)
        self._take(config, decoder, _HELD[model.dtype], model.device, computed, fingerprint(model), tokenizer)
        head = model.get_output_embeddings().weight
        self.nbytes = self.read_bytes = model.get_memory_footprint()
        matrices = {id(x): x.numel() for x in model.parameters() if x.dim() > 1}
        table = model.get_input_embeddings().weight
        self.head_weights = head.numel()
        self.row_weights = sum(matrices.values()) - sum({id(x): x.numel() for x in (head, table)}.values())


def load(folder: Path | str, *, weights: Weights = "auto", device: str = "cpu") -> TransformersModel:
    """Loads a folder that transformers wrote, or that kvik has prepared. Code that comes with a model is not run.

    Args:
        weights: f32 or bf16; auto = f32 where the files hold it, else bf16.

    Raises:
        UsageError: the weights are to be held as transformers can't.
        ConfigError: the folder holds no model.
        ModelError: transformers can't load it; it is prepared and of a family that kvik doesn't write out for
            transformers; or see `TransformersDecoder`.
    """
    folder = Path(folder)
    if weights not in ("auto", *_TYPES):
        raise UsageError(f"weights {weights}: transformers holds them in f32 or bf16; or leave out --backend")
    values = read_json(folder / "config.json")
    stored = values.get("dtype", values.get("torch_dtype", "float32"))
    held = weights if weights != "auto" else "f32" if stored == "float32" else "bf16"
    try:
        with _silent():
            if "kvik" in values:  # prepared by kvik: a GGUF file, or what is built in
                model, _ = in_transformers(str(folder), _TYPES[held])
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=_TYPES[held], local_files_only=True, trust_remote_code=False
                )
    except KvikError:
        raise
    except Exception as error:  # of any kind, and with any text
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder}: transformers can't load it ({text}); give another folder, or leave out --backend"
        ) from error
    tokenizer = Tokenizer(folder)
    return TransformersModel(model.to(device), tokenizer, name=folder.name)


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bars: who loads has one of their own."""
    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if showed:
            logging.enable_progress_bar()


def _config(model: PreTrainedModel, decoder: TransformersDecoder, name: str) -> TransformersConfig:
    text: PretrainedConfig = model.config.get_text_config(decoder=True)
    values = text.to_dict()
    heads, hidden = text.num_attention_heads, text.hidden_size
    kept = max(shape.heads for shape in decoder.layers)
    positions = values.get("max_position_embeddings") or values.get("n_positions")
    if not isinstance(positions, int):
        raise ModelError(f"{name}: its configuration doesn't say how many positions it has")
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = text.eos_token_id if ends is None else ends
    ids = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    return TransformersConfig(
        name=name, vocab_size=model.get_output_embeddings().weight.shape[0], layers=len(decoder.layers), hidden=hidden,
        heads=heads, kv_heads=kept if heads % kept == 0 else heads, head_dim=values.get("head_dim") or hidden // heads,
        max_positions=positions, tied_embeddings=bool(values.get("tie_word_embeddings")), eos_ids=ids,
        bos_id=text.bos_token_id,
    )  # fmt: skip
