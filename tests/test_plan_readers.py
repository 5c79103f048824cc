"""Plans of models that read a source: parameters are transformers', bytes those of a loaded model's cache."""

import json

import pytest

from kvik.errors import SpecError, UsageError
from kvik.plan import from_config, lookup, make_plan, run_plan
from readers import READERS, drawn, ours, tokens


@pytest.mark.parametrize("name", READERS)
def test_parameters_are_counted_as_transformers_counts_them(name):
    theirs = drawn(name)
    values = theirs.config.to_dict()
    if name in ("t5 v1.1", "mt5"):  # as its checkpoints say; today's settings no longer do
        values["tie_word_embeddings"] = False
    assert from_config(values).parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("kv", ["f16", "int8; cross: int4", "k8v4+window:40,sinks:4; layers 1: f32; page 16"])
@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "marian"])
def test_bytes_are_those_of_the_loaded_models_cache(name, kv):
    theirs = drawn(name)
    model, shape = ours(theirs), from_config(theirs.config.to_dict())
    for rows, length in ((1, 1), (100, 70), (33, 128)):
        plan = make_plan(shape, kv=kv, context=length, source=rows)
        spec = model.spec(kv)
        assert plan.per_sequence == spec.nbytes(length, source=rows)
        assert plan.cross == spec.nbytes(0, source=rows)
        cache = model.cache(kv, memory=16 << 20)
        with cache.open(source=model.fill(cache, tokens(rows, 1))) as sequence:
            while len(sequence) < length:
                model.run([(sequence, tokens(min(16, length - len(sequence)), 2))])
                sequence.settle()
            held = sequence.nbytes
        assert held == plan.per_sequence


def test_a_source_of_another_length_changes_what_cross_attention_keeps_alone():
    short, long = (run_plan("opus-mt-en-de", context=100, source=rows) for rows in (20, 512))
    assert short.per_token == long.per_token
    assert short.cross.payload == 20 * 6 * 2 * 512 * 2 and long.cross.payload == 512 * 6 * 2 * 512 * 2
    assert short.per_sequence.allocated - short.cross.allocated == long.per_sequence.allocated - long.cross.allocated
    cross = run_plan("t5-base", kv="f16; cross: int8")
    assert cross.cross.payload == run_plan("t5-base").cross.payload // 2
    assert cross.per_token == run_plan("t5-base").per_token
    assert "source rows" in json.dumps(cross.to_dict()["formula"])


def test_what_a_plan_of_them_cannot_take_is_said():
    with pytest.raises(UsageError, match="smollm2 reads no source"):
        run_plan("smollm2", source=10)
    with pytest.raises(UsageError, match="--source 0"):
        run_plan("t5-small", source=0)
    with pytest.raises(SpecError, match="use 'h2o'"):
        run_plan("t5-small", kv="f16+snapkv:64rows")


@pytest.mark.parametrize(("name", "millions"), [("bart-base", 139), ("bart-large", 406)])
def test_the_tables_sizes_are_the_published_ones(name, millions):
    assert lookup(name).parameters == pytest.approx(millions * 1e6, rel=0.004)
