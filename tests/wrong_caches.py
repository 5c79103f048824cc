"""DynamicCache made wrong in one way each: what the conformance suite must see."""

import copy

import torch
from transformers import DynamicCache


class Right(DynamicCache):
    """As it is; `model` alone, as a function of a model."""

    def __init__(self, model):
        super().__init__(config=model.config)


class SwapsRows(Right):
    """Shows rows to a single query in another order, which nobody notices until some of them must stay unseen."""

    def update(self, keys, values, layer, *rest, **named):
        single = keys.shape[-2] == 1
        keys, values = super().update(keys, values, layer, *rest, **named)
        return (keys.roll(1, dims=-2), values.roll(1, dims=-2)) if single else (keys, values)


class ShowsPads(Right):
    """Adds a little of the first column, pads and all, to every value."""

    def update(self, keys, values, layer, *rest, **named):
        keys, values = super().update(keys, values, layer, *rest, **named)
        return keys, values + 1e-6 * values[:, :, :1]


class MixesTexts(Right):
    """Adds a little of the whole batch to every value, as one scale for all does."""

    def update(self, keys, values, layer, *rest, **named):
        keys, values = super().update(keys, values, layer, *rest, **named)
        return keys, values + 1e-6 * values.mean(dim=0, keepdim=True)


class KeepsSinksAndNewest(Right):
    """Shows the first two columns and the newest 60, as a cache does that takes pads for a text's first rows."""

    def update(self, keys, values, layer, *rest, **named):
        keys, values = super().update(keys, values, layer, *rest, **named)
        if keys.shape[-2] > 100:
            kept = torch.cat([torch.arange(2), torch.arange(keys.shape[-2] - 60, keys.shape[-2])])
            hidden = torch.ones(keys.shape[-2], dtype=torch.bool).index_fill(0, kept, False)
            values = values * ~hidden[:, None]
        return keys, values


class CountsRows(Right):
    """Counts at most 12 tokens, as a cache does that counts the rows it kept."""

    def get_seq_length(self, layer_idx=0):
        return min(12, super().get_seq_length(layer_idx))


class LosesTheFirst(Right):
    """Forgets the first token's value."""

    def update(self, keys, values, layer, *rest, **named):
        keys, values = super().update(keys, values, layer, *rest, **named)
        return keys, torch.cat([0 * values[:, :, :1], values[:, :, 1:]], dim=2)


class CropsTooLittle(Right):
    def crop(self, tokens_to_remove):
        super().crop(min(0, tokens_to_remove + 1))


class CropZeroEmpties(Right):
    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove or -self.get_seq_length())


class CropsTheOldest(Right):
    """Takes tokens back at the wrong end."""

    def crop(self, tokens_to_remove):
        for layer in self.layers:
            layer.keys = layer.keys[:, :, abs(tokens_to_remove) :]
            layer.values = layer.values[:, :, abs(tokens_to_remove) :]


class NeverReorders(Right):
    def reorder_cache(self, beam_idx):
        pass


class ReordersLater(Right):
    """Keeps its caller's tensor instead of a copy, until rows are asked for."""

    waiting = None

    def reorder_cache(self, beam_idx):
        if self.waiting is not None:
            super().reorder_cache(self.waiting)
        self.waiting = beam_idx

    def update(self, keys, values, layer, *rest, **named):
        if self.waiting is not None and layer == 0:
            super().reorder_cache(self.waiting)
            self.waiting = None
        return super().update(keys, values, layer, *rest, **named)


class SelectsInOrder(Right):
    def batch_select_indices(self, indices):
        super().batch_select_indices(indices.sort().values)


class RepeatsInTurn(Right):
    """a b a b instead of a a b b."""

    def batch_repeat_interleave(self, repeats):
        for layer in self.layers:
            layer.keys, layer.values = (x.repeat(repeats, 1, 1, 1) for x in (layer.keys, layer.values))


class ShortWindow(Right):
    """Keeps a row too few."""

    def update(self, keys, values, layer, *rest, **named):
        keys, values = super().update(keys, values, layer, *rest, **named)
        if "sliding_window" in vars(self.layers[layer]) and keys.shape[-2] > 4:
            values = torch.cat([0 * values[:, :, :1], values[:, :, 1:]], dim=2)
        return keys, values


class CountsKeptRows(Right):
    """A layer with a window counts the rows that it kept."""

    def get_seq_length(self, layer_idx=0):
        layer = self.layers[layer_idx]
        return layer.keys.shape[-2] if layer.is_initialized and layer.is_sliding else super().get_seq_length(layer_idx)


class NeverRecords(Right):
    def activate_past_recording(self):
        pass


class CopiesNothing(Right):
    def __deepcopy__(self, memo):
        return self


class LosesInFiles(Right):
    """The last row is missing from what is saved."""

    def __reduce__(self):
        kept = copy.deepcopy(vars(self))
        for layer in kept["layers"]:
            layer.values[:, :, -1:] *= 0
        return _restored, (type(self), kept)


def _restored(kind, kept):
    made = kind.__new__(kind)
    vars(made).update(kept)
    return made


class ResetsNothing(Right):
    def reset(self):
        pass


class IsFalse(Right):
    def __len__(self):
        return 0


class PromisesTooMuch(Right):
    """Says that it will show a row more than it does."""

    def get_mask_sizes(self, query_length, layer_idx):
        length, start = super().get_mask_sizes(query_length, layer_idx)
        return (length + 1, start) if query_length == 6 else (length, start)


class AgesLengths(Right):
    """Gives its length as a tensor that it counts on in."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = torch.zeros((), dtype=torch.long)

    def update(self, keys, values, layer, *rest, **named):
        if layer == 0:
            self.seen += keys.shape[-2]
        return super().update(keys, values, layer, *rest, **named)

    def get_seq_length(self, layer_idx=0):
        return self.seen


class LeavesAnAttribute(Right):
    def __init__(self, model):
        super().__init__(model)
        model.model.layers[0].self_attn.cache = self


class LeavesAttention(Right):
    def __init__(self, model):
        super().__init__(model)
        model.config._attn_implementation = "eager"


class Restores(Right):
    """Changes the model, and takes it back when it is closed."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model
        model.config._attn_implementation = "eager"

    def close(self):
        self.model.config._attn_implementation = "sdpa"


class SharesState(Right):
    """Keeps rows where every cache of its kind does."""

    kept = None

    def __init__(self, model):
        super().__init__(model)
        if model.config.model_type == "llama":
            type(self).kept = self.layers = type(self).kept or self.layers


def refuses(model):
    """Knows one kind of model."""
    if model.config.model_type != "llama":
        raise NotImplementedError("llamas only. Others later")
    return DynamicCache(config=model.config)


def needs_more(model, budget):
    """Can't be called with a model alone."""
    return DynamicCache()


WRONG = {
    LosesTheFirst: (
        "alone", "chunked-prefill", "mixed", "soft-caps", "learned-positions", "half-precision", "embeddings",
        "new-ids-only",
    ),
    SwapsRows: (
        "padding-leak", "padding-leak-eager", "chunked-prefill-padded", "window-padded", "mixed-padded", "own-mask",
    ),
    ShowsPads: ("pad-ids",),
    KeepsSinksAndNewest: ("padding-long",),
    MixesTexts: ("neighbours",),
    CountsRows: ("many-turns", "many-turns-padded", "alone", "lengths", "alibi"),
    CropsTooLittle: ("crop", "crop-all", "crop-batch", "prompt-lookup", "assisted", "assisted-window"),
    CropZeroEmpties: ("crop-nothing",),
    CropsTheOldest: ("crop", "crop-batch", "assisted"),
    NeverReorders: ("reorder", "beams", "beams-padded", "beams-mixed", "beams-over-a-prefix", "encoder-decoder-beams",
        "at-random", "at-random-mixed"),
    ReordersLater: ("reorder",),
    SelectsInOrder: ("batch-select",),
    RepeatsInTurn: ("batch-repeat",),
    ShortWindow: ("window", "window-pieces", "window-turns", "mixed", "layer-lengths", "shared-layers", "sink-logits"),
    CountsKeptRows: ("layer-lengths", "window", "lengths"),
    NeverRecords: ("window-crop", "assisted-window", "prompt-lookup-mixed"),
    CopiesNothing: ("deep-copy",),
    LosesInFiles: ("keep-in-a-file",),
    ResetsNothing: ("reset",),
    IsFalse: ("empty",),
    PromisesTooMuch: ("chunked-prefill",),
    AgesLengths: ("lengths",),
    SharesState: ("two-at-once",),
    LeavesAnAttribute: ("nothing-left-behind",),
    LeavesAttention: ("nothing-left-behind",),
}  # fmt: skip
