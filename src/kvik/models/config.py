"""What a model is, in one frozen value; each family adds what is its own, and reads it from a model's own metadata."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from kvik.errors import ConfigError, UsageError
from kvik.models.constraints import Constraints
from kvik.models.fields import Fields
from kvik.models.rope import Kind, Rope

MOST_LAYERS = 10_000
MOST_WIDTH = 2**20
MOST_ROWS = 2**24  # of a vocabulary, or channels of a feed-forward part
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # control tokens that end a turn in the known chat formats
_CONTROL = 3  # GGUF's token type of control tokens
_PREPARED = "prepared config.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all families have in common.

    Attributes:
        family: its name, as prepared folders and GGUF files write it.
        name: for people.
        vocab_size, layers, hidden, heads, kv_heads, head_dim: its sizes; heads is a multiple of kv_heads.
        max_positions: positions it was made for; a hard limit where positions are learned.
        tied_embeddings: whether the output projection is the embedding.
        eos_ids: every token id that ends a text.
        bos_id: the token id that begins one, or None.
    """

    family: ClassVar[str]

    name: str
    vocab_size: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    tied_embeddings: bool
    eos_ids: tuple[int, ...]
    bos_id: int | None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.name}: {self.heads} query heads can't share {self.kv_heads} key heads evenly")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's canonical name and shape: those of transformers' own files for the family."""
        raise NotImplementedError

    def sharing(self, rule: str) -> Self:
        """The same model with layers that read the rows of others, by one of `cache/sharing.py`'s rules: another model,
        for which the weights were not trained. Raises UsageError."""
        raise UsageError(
            f"share {rule!r}: layers of {self.family} models can't share rows in kvik; leave it out, or use another "
            "model, such as smollm2"
        )

    def other_names(self) -> dict[str, tuple[str, ...]]:
        """For tensors that files may hold under other names as well, or instead: those names."""
        return {}

    def spare(self, name: str) -> bool:
        """Whether files may hold this tensor though nothing depends on it."""
        return self.tied_embeddings and name == "lm_head.weight"

    def optional_tensors(self) -> tuple[str, ...]:
        """Names of `tensor_shapes` that files may leave out: they are zero then."""
        return ()

    @property
    def most_positions(self) -> int:
        """Tokens of a text at the most: where nothing else limits them, those that it was made for."""
        return self.max_positions

    def to_json(self) -> dict[str, object]:
        """The same as plain JSON types; what has its usual value is left out."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: value for name, value in dataclasses.asdict(self).items() if value != usual[name]}
        return {"family": self.family, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """What `to_json` gave, checked again, each value by its field's type. Raises ConfigError."""
        hints = {field.name: typing.get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)}
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if not {"family", *needed} <= set(values) <= {"family", *hints} or values["family"] != cls.family:
            raise ConfigError(f"{_PREPARED} has other keys than this version of kvik writes; delete its folder")
        fields = Fields(values, _PREPARED)
        given: dict[str, Any] = {name: _of_type(fields, name, hint) for name, hint in hints.items() if name in values}
        return cls(**given)


def end_ids(*sources: Fields) -> tuple[int, ...]:
    """Every end-of-sequence id that any source names, in order, once each."""
    return tuple(dict.fromkeys(i for fields in sources for i in fields.ids("eos_token_id")))


def first_id(fields: Fields, key: str) -> int | None:
    """A token id, or None where there is none."""
    return fields.integer(key, least=0) if fields.has(key) else None


def windows_of(fields: Fields, layers: int, window: int | None, has: Callable[[int], bool]) -> tuple[int | None, ...]:
    """For each layer, how many positions back it sees, from `layer_types` where config.json has them.

    Args:
        window: of the layers that have one.
        has: whether a layer has one, where there are no `layer_types`.

    Raises:
        ConfigError: a layer is of another kind, or would have a window of no size.
    """
    types = fields.values.get("layer_types")
    if types is None:
        return tuple(window if has(layer) else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        fields.fail("layer_types", f"must name sliding_attention or full_attention for each of the {layers} layers")
    if window is None and "sliding_attention" in types:
        fields.fail("layer_types", "there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def gguf_end_ids(fields: Fields) -> tuple[int, ...]:
    """The file's end-of-sequence and end-of-turn ids, and those of `END_TOKENS` that are control tokens in it."""
    ids = [*fields.ids("tokenizer.ggml.eos_token_id"), *fields.ids("tokenizer.ggml.eot_token_id")]
    tokens, kinds = fields.values.get("tokenizer.ggml.tokens"), fields.values.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list):
        ends = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL}
        ids += [ends[text] for text in END_TOKENS if text in ends]
    return tuple(dict.fromkeys(ids))


def gguf_common(fields: Fields, arch: str) -> dict[str, Any]:
    """What a GGUF file says of every decoder, as `Config`'s fields. Raises ConfigError."""

    def size(key: str, default: int | None = None, most: int = MOST_ROWS) -> int:
        key = f"{arch}.{key}"
        return fields.integer(key, most=most) if default is None else fields.integer(key, default, most=most)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    if not fields.has(f"{arch}.attention.key_length") and hidden % heads:
        fields.fail(f"{arch}.attention.head_count", f"embedding_length {hidden} is not a multiple of it")
    head_dim, kv_heads = size("attention.key_length", hidden // heads), size("attention.head_count_kv", heads)
    fields.refuse_unless(f"{arch}.attention.value_length", (head_dim,))
    if heads % kv_heads:
        fields.fail(f"{arch}.attention.head_count_kv", f"the {heads} heads can't share that many key heads")
    vocabulary = fields.values.get("tokenizer.ggml.tokens")
    counted = len(vocabulary) if isinstance(vocabulary, list) and vocabulary else None
    return dict(
        name=fields.where,
        vocab_size=size("vocab_size", counted),
        layers=size("block_count", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=size("context_length", most=2**31 - 1),
        tied_embeddings="output.weight" not in gguf_tensors(fields),
        eos_ids=gguf_end_ids(fields),
        bos_id=next(iter(fields.ids("tokenizer.ggml.bos_token_id")), None),
    )


def gguf_tensors(fields: Fields) -> tuple[str, ...]:
    """The names of a GGUF file's tensors, which say what its metadata doesn't."""
    names = fields.values.get("GGUF.tensors")
    if not isinstance(names, list | tuple):
        raise ConfigError(f"{fields.where}: the names of its tensors are missing; pass what read_gguf returns")
    return tuple(names)


def _of_type(fields: Fields, name: str, hint: Any) -> object:
    """One value of a prepared config.json, by the type of its field."""
    if type(None) in typing.get_args(hint):
        if not fields.has(name):
            return None
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    if hint is Rope:
        return _rope(fields.values[name])
    if hint is Constraints:
        values = fields.values[name]
        return Constraints.from_json(values) if isinstance(values, dict) else fields.fail(name, "must be an object")
    if hint is int:
        return fields.integer(name, least=0)
    if hint is float:
        return fields.number(name, above=-1.0)
    if hint is bool:
        return fields.flag(name)
    if hint is str:
        return fields.text(name)
    if hint == tuple[int, ...]:
        return fields.ids(name)
    if hint == tuple[int | None, ...]:
        return _windows(fields, name)
    raise AssertionError(f"{name}: no way to read {hint}")


def _rope(values: object) -> Rope:
    known = {field.name for field in dataclasses.fields(Rope)}
    if not isinstance(values, dict) or set(values) != known:
        raise ConfigError("prepared config.json has other rope settings than this version of kvik writes")
    fields = Fields(values, f"{_PREPARED} (rope)")
    numbers = ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    return Rope(
        head_dim=fields.integer("head_dim"),
        kind=cast(Kind, fields.text("kind", among=("default", "linear", "llama3", "yarn"))),
        original_positions=fields.integer("original_positions", least=0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.number("mscale", above=-1.0) if fields.has("mscale") else None,
        mscale_all_dim=fields.number("mscale_all_dim", above=-1.0) if fields.has("mscale_all_dim") else None,
        truncate=fields.flag("truncate"),
        factors=fields.numbers("factors"),
        **{key: fields.number(key) for key in numbers},
    )


def _windows(fields: Fields, name: str) -> tuple[int | None, ...]:
    windows = fields.values[name]
    if not isinstance(windows, list | tuple) or not all(w is None or (type(w) is int and w > 0) for w in windows):
        fields.fail(name, "must be a list with a number of positions or null for each layer")
    return tuple(windows)
