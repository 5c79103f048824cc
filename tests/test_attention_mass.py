"""Attention mass: what each row received, whatever the cut, and with its row wherever that moves."""

import contextlib

import pytest
import torch

import tiny_models
from helpers import shapes, text
from test_compaction import SCALE, feed, held, opened


def test_attention_mass_is_what_dense_attention_gives(ops):
    toy, _, sequence = opened("f32+h2o:50%", prompt=90, shares=False)
    feed(toy, sequence, text(80))
    mass = sequence._observed[0].mass[:, :80]
    q, k = (toy.row(name, 0, text(80), range(80)) for name in ("q", "k"))
    for lane in range(3):
        scores = torch.stack([q[:, h] @ k[:, lane].T for h in range(lane * toy.shared, (lane + 1) * toy.shared)])
        scores = (scores * SCALE).masked_fill(~torch.ones(80, 80).tril().bool(), -torch.inf)
        torch.testing.assert_close(mass[lane], scores.softmax(-1).sum((0, 1)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kv", ["int8+h2o:64rows,every:32", "f32+h2o:40%,every:24"])
def test_attention_mass_is_the_same_in_every_bit_however_a_text_is_cut(kv, ops):
    """Sums of f32 depend on their order: chunk by chunk they would differ, and some day other rows would stay."""
    found = []
    for piece in (1000, 1, 7, 33):
        toy, _, sequence = opened(kv, prompt=100, shares=False)
        feed(toy, sequence, text(150), piece)
        found.append((sequence._observed[0].mass.tolist(), held(sequence)))
    assert all(each == found[0] for each in found[1:])


@pytest.mark.parametrize("share", ["pairs", "last:2"])
def test_so_is_that_of_rows_that_several_layers_read(share, ops):
    model, found = tiny_models.ours(tiny_models.drawn(tiny_models.llama), share=share), []
    for piece in (1000, 1, 7):
        sequence = model.cache("int8+h2o:64rows,every:32", shares=False).open()
        start, tokens = 0, tiny_models.tokens(120)
        while start < len(tokens):
            count = min(piece, len(tokens) - start, sequence.next_trigger - start)
            model.run([(sequence, tokens[start : start + count])])
            sequence.settle()
            start += count
        found.append((sequence._observed[0].mass.tolist(), held(sequence)))
    assert found[0] == found[1] == found[2]


def test_who_asks_for_mass_beside_a_policy_gets_that_of_the_step(ops):
    toy, cache, sequence = opened("f32+h2o:50%", prompt=90, layers=shapes(layers=1, heads=3), shares=False)
    feed(toy, sequence, text(40))
    with cache.step([(sequence, text(5, 1))]) as step:
        toy.append(step, 0)
        (mass,) = step.attend(0, toy.row("q", 0, step.tokens, step.positions), scale=SCALE, want_mass=True).mass
    sequence.settle()
    torch.testing.assert_close(mass.sum(1), torch.full((3,), 5.0 * toy.shared), atol=1e-2, rtol=0)
    total = sequence._observed[0].mass.sum(1)
    torch.testing.assert_close(total, torch.full((3,), 45.0 * toy.shared), atol=1e-1, rtol=0)


def mass_of(*ways):
    """Attention mass after 40 tokens, 30 more not settled yet, these ways of going on, and all of it settled."""
    toy, cache, sequence = opened("f32+h2o:50%", prompt=90, shares=False)
    feed(toy, sequence, text(40))
    toy.run([(sequence, text(30, 1))])
    for way in ways:
        if way == "failed":
            with contextlib.suppress(ZeroDivisionError), sequence.append(text(9, 2)) as step:
                toy.append(step, 0)
                step.attend(0, toy.row("q", 0, step.tokens, step.positions), scale=SCALE)
                raise ZeroDivisionError
        elif way == "forked":
            sequence = sequence.fork()
        else:
            sequence.settle(30)
    sequence.settle()
    cache.check()
    return sequence._observed[0].mass


@pytest.mark.parametrize("way", ["failed", "accepted", "forked"])
def test_what_earlier_steps_saw_stays_pending(way, ops):
    assert torch.equal(mass_of(way), mass_of())


def test_attention_mass_moves_with_its_rows(ops):
    toy, _, sequence = opened("f32+h2o:50%,every:40", prompt=160, shares=False)
    feed(toy, sequence, text(160))
    table, mass = sequence.tables[0], sequence._observed[0].mass
    total = mass.sum(1)
    feed(toy, sequence, text(39, 3))
    after = sequence._observed[0].mass
    # 39 queries gave weights that add up to 1 each, to rows that are still there
    torch.testing.assert_close(after.sum(1) - total, torch.full((9,), 39.0 * toy.shared), atol=1e-2, rtol=0)
    assert table.kept is not None
