"""A trace as plain data: what `kvik trace --json` prints."""

from __future__ import annotations

from torch import Tensor

from kvik.trace.recording import Difference, Frame, Look, Trace

Facts = dict[str, object]


def facts(trace: Trace, layer: int, head: int) -> Facts:
    """All that the terminal view shows, as JSON takes it, for one recorded layer and one of its query heads.

    Rows and pairs are counted from the beginning of the text: rows of k and v of the head's lane, pairs of the head.
    """
    lane = trace.lane(head)
    last = trace.frames[-1]
    return {
        "model": trace.model,
        "weights": trace.weights,
        "spec": trace.spec,
        "text": trace.text,
        "tokens": [{"id": token, "text": trace.texts[token]} for token in trace.tokens],
        "prefill": trace.prompt,
        "layers": trace.layers,
        "heads": trace.heads,
        "lanes": trace.lanes,
        "page_rows": trace.page_size,
        "layer": layer,
        "head": head,
        "lane": lane,
        "heads_of_lane": list(trace.sharing(lane)),
        "keys_rotated": trace.rotated,
        "steps": [_step(trace, frame, layer, head) for frame in trace.frames],
        "all_layers": {
            "rows_computed": {"with_cache": int(last.cached.rows.sum()), "without": int(last.recomputed.rows.sum())},
            "pairs": {"with_cache": int(last.cached.pairs.sum()), "without": int(last.recomputed.pairs.sum())},
        },
        "largest_difference": {
            "recomputed": max(frame.same.largest for frame in trace.frames),
            "f32_rows": max(frame.plain.largest for frame in trace.frames),
        },
    }


def states(look: Look, lane: int) -> list[str]:
    """What became of each row of a lane, by position: "seen" by the step's last query, "hidden" from it by a window
    but still in a page that is held, or "gone" with its page."""
    pairs = zip(look.seen[lane, -1].tolist(), look.held[lane].tolist(), strict=True)
    return ["seen" if seen else "hidden" if held else "gone" for seen, held in pairs]


def rows(look: Look, lane: int) -> int:
    """How many rows a lane's K and V had in the step: those that some query saw, and those that were only held."""
    return int((look.seen[lane].any(dim=0) | look.held[lane]).sum())


def _step(trace: Trace, frame: Frame, layer: int, head: int) -> Facts:
    look, lane = frame.looks[layer], trace.lane(head)
    state = states(look, lane)
    count, held, width = len(frame.tokens), rows(look, lane), look.k.shape[2]
    new = zip(range(frame.start, frame.length), frame.tokens, strict=True)
    return {
        "step": frame.number,
        "phase": frame.phase,
        "tokens": [{"position": at, "id": token, "text": trace.texts[token]} for at, token in new],
        "predicts": [
            {"id": guess.token, "text": trace.texts[guess.token], "probability": _short(guess.probability)}
            for guess in frame.guesses
        ],
        "shapes": {"q": [count, width], "K_T": [width, held], "V": [held, look.v.shape[2]]},
        "q": _numbers(look.q[:, head]),
        "K_T_new_columns": _numbers(look.k[lane]),
        "V_new_rows": _numbers(look.v[lane]),
        "attention_weights": [
            {"position": at, "text": trace.texts[trace.tokens[at]], "weight": _short(weight)}
            for at, weight in enumerate(look.weights[-1, head].tolist())
            if state[at] == "seen"
        ],
        "rows": {each: state.count(each) for each in ("seen", "hidden", "gone")} | {"new": count},
        "bytes": {
            "payload": frame.nbytes.payload,
            "overhead": frame.nbytes.overhead,
            "allocated": frame.nbytes.allocated,
        },
        "rows_computed": {
            "with_cache": int(frame.cached.rows[layer, lane]),
            "without": int(frame.recomputed.rows[layer, lane]),
        },
        "pairs": {
            "with_cache": int(frame.cached.pairs[layer, head]),
            "without": int(frame.recomputed.pairs[layer, head]),
        },
        "difference": {"recomputed": _apart(frame.same), "f32_rows": _apart(frame.plain)},
    }


def _apart(difference: Difference) -> Facts:
    return {"logits": difference.logits, "attention": difference.attention}


def _numbers(rows: Tensor) -> list[list[float]]:
    return [[_short(number) for number in row] for row in rows.tolist()]


def _short(number: float) -> float:
    """Without the digits that f32 does not have."""
    return float(f"{number:.7g}")
