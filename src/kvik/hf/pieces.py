"""A forward that a policy wants to look into: it goes through the model piece by piece.

A policy chooses at positions (`keydiff:1024rows`: every 128 tokens), and no chunk may pass such a position. What
`generate` gives in one forward is then cut there, in columns, and what comes out is put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvik.errors import SequenceError

_BY_COLUMN = ("input_ids", "inputs_embeds", "token_type_ids")  # [rows, columns, …]
_AT_THE_END = ("position_ids", "cache_position")  # […, columns]
_MADE = ("logits", "last_hidden_state")  # [rows, columns, width] of what comes out


@dataclass
class Pieces:
    """What all pieces but the last gave.

    Attributes:
        keep: last columns whose logits are wanted; 0 = all.
    """

    found: list[dict[str, Tensor]]
    keep: int

    def joined(self, last: Any) -> Any:
        """What the last piece gave, with what the others gave before it."""
        for name in self.found[0]:
            whole = torch.cat([each[name] for each in [*self.found, last]], dim=1)
            last[name] = whole[:, -self.keep :] if name == "logits" else whole
        return last


def by_pieces(
    forward: Callable[..., Any], inputs: dict[str, Any], columns: int, room: Callable[[], int]
) -> tuple[dict[str, Any], Pieces | None]:
    """Takes all of a forward through a model but its last piece.

    Args:
        forward: the model.
        inputs: what it was given; `columns` of them are new.
        room: how many columns may come next.

    Returns:
        The inputs of the last piece, and what the others gave; None where there are no others.

    Raises:
        SequenceError: something that it was given can't be cut, or is asked for in a form that can't be put together.
    """
    found: list[dict[str, Tensor]] = []
    done, keep = 0, inputs.get("logits_to_keep")
    if not isinstance(keep, int | None):
        return inputs, None  # chosen columns: refused where they are cut
    while (count := room()) < columns - done:
        if inputs.get("return_dict") is False or inputs.get("output_hidden_states"):
            raise SequenceError(
                "a policy chooses in the middle of these tokens: leave out output_hidden_states, and return_dict=False"
            )
        given = forward(**piece(inputs, done, done + count, columns))
        found.append({name: given[name] for name in _MADE if name in given})
        done += count
    if not done:
        return inputs, None
    return piece(inputs, done, columns, columns), Pieces(found, keep or 0)


def piece(inputs: dict[str, Any], first: int, end: int, columns: int) -> dict[str, Any]:
    """The inputs of some of a forward's new columns."""
    out = dict(inputs)
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            continue
        if name in _BY_COLUMN:
            out[name] = x[:, first:end]
        elif name in _AT_THE_END:
            out[name] = x[..., first:end]
        elif name == "attention_mask" and x.dim() == 2:
            out[name] = x[:, : x.shape[1] - columns + end]
        elif name.startswith("encoder_") or name == "logits_to_keep":
            continue
        else:
            raise SequenceError(
                f"a policy chooses in the middle of these tokens, and {name!r} can't be cut there; give "
                "prefill_chunk_size, or a spec whose policy chooses at the prompt's end, such as 'snapkv:25%'"
            )
    return out
