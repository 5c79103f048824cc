"""All cases, in the order in which they are shown. A case's law is the first line of its docstring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvik.errors import UsageError
from kvik.hf.conformance import architectures, batches, encoders, manners, mixture, search, turns, uses, windows
from kvik.hf.conformance.given import Given

Check = Callable[[Given], str]  # a remark where it holds; raises BrokenError or UnfitError


@dataclass(frozen=True)
class Case:
    """One thing that must hold.

    Attributes:
        name: for --only.
        law: what must hold, in a line.
        check: tries it.
    """

    name: str
    law: str
    check: Check


_CHECKS: tuple[Check, ...] = (
    turns.alone,
    turns.chunked_prefill,
    turns.chunked_prefill_padded,
    batches.padding_leak,
    batches.padding_leak_eager,
    batches.padding_long,
    batches.pad_ids,
    batches.neighbours,
    turns.many_turns,
    turns.many_turns_padded,
    turns.crop,
    turns.crop_nothing,
    turns.crop_all,
    turns.crop_batch,
    batches.reorder,
    batches.batch_select,
    batches.batch_repeat,
    batches.num_return_sequences,
    search.beams,
    search.beams_padded,
    search.beams_mixed,
    search.beams_over_a_prefix,
    search.prompt_lookup,
    search.prompt_lookup_mixed,
    search.assisted,
    search.assisted_window,
    windows.window,
    windows.window_pieces,
    windows.window_padded,
    windows.window_turns,
    windows.window_crop,
    windows.mixed,
    windows.mixed_padded,
    windows.layer_lengths,
    architectures.shared_layers,
    architectures.soft_caps,
    architectures.sink_logits,
    architectures.alibi,
    architectures.alibi_by_length,
    architectures.learned_positions,
    architectures.latent_attention,
    architectures.recurrent_layers,
    architectures.half_precision,
    encoders.encoder_decoder_relative,
    encoders.encoder_decoder_learned,
    encoders.encoder_decoder_sound,
    encoders.encoder_decoder_beams,
    encoders.encoder_decoder_turns,
    encoders.encoder_decoder_alone,
    uses.embeddings,
    uses.new_ids_only,
    uses.own_mask,
    uses.two_at_once,
    uses.interrupted,
    mixture.at_random,
    mixture.at_random_mixed,
    turns.deep_copy,
    turns.keep_in_a_file,
    turns.reset,
    manners.empty,
    manners.lengths,
    manners.growth,
    manners.no_patch_at_import,
    manners.nothing_left_behind,
)


def _law(check: Check) -> str:
    return (check.__doc__ or "").strip().splitlines()[0]


CASES = tuple(Case(check.__name__.replace("_", "-"), _law(check), check) for check in _CHECKS)


def chosen(names: list[str]) -> tuple[Case, ...]:
    """The cases of these names, or all if none is given.

    Raises:
        UsageError: there is no such case.
    """
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise UsageError(f"--only {name}: no such case; --list names all {len(known)}")
    return tuple(known[name] for name in names) if names else CASES
