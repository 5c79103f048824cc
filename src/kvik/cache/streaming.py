"""Which lanes look far back and which only at sinks and recent rows (DuoAttention, arXiv:2410.10819)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvik.cache import weigh
from kvik.cache.seen import Seen
from kvik.errors import SpecError


def check_turned(frequencies: Sequence[float] | Tensor | None) -> None:
    """Raises SpecError where positions don't turn queries and keys: every lane would look equally far."""
    if frequencies is None:
        raise SpecError(
            "lanes can't be told apart by distance: this model's positions don't turn its keys (no rotary); use "
            "another model"
        )


def far_sight(seen: Seen, *, span: int = 500) -> Tensor:
    """How far back each lane looks, from 0 (only at itself) to 1 (only at the far end): f32 [L].

    DuoAttention (arXiv:2410.10819) learns a gate for each head; this is the score without training that kvpress offers
    beside it. The mean query of each head and the mean key of its lane, turned back to position 0, stand at `span`
    positions; the score is the area under the cumulated attention of the last one, from the first position on, as a
    mean over positions and G. What tokens say cancels out: only what distance does to the lane's attention is left. The
    lowest lanes can make do with a window and sinks.

    Args:
        seen: its keys at known positions and its observed queries.
        span: positions that the means are repeated over.

    Raises:
        SpecError: see `check_turned`.
    """
    check_turned(seen.frequencies)
    assert seen.frequencies is not None, "that was checked"
    packed, _ = seen.packed()
    assert packed.queries is not None and packed.asking is not None, "no queries were observed"
    back = weigh.turns(seen.frequencies, -packed.asking)[:, None, None]
    query = weigh.turned(packed.queries, back).mean(0)  # [L, G, D]
    back = torch.unflatten(weigh.turns(seen.frequencies, -packed.positions.flatten()), 0, packed.positions.shape)
    key = weigh.turned(packed.keys, back).sum(1) / packed.lengths.clamp(min=1)[:, None]  # [L, D]
    places = torch.arange(span, device=key.device)
    turns = weigh.turns(seen.frequencies, places)
    level = replace(
        packed,
        keys=weigh.turned(key[:, None].expand(-1, span, -1), turns),
        positions=places.expand(len(key), -1),
        queries=weigh.turned(query, turns[-1])[None],
        asking=places[-1:],
    )
    attention = next(weigh.weights(level))[:, :, 0]  # [L, G, span]
    return attention.cumsum(-1).mean(-1).mean(1)
