"""Translution is what its formula says, attention and convolution are cases of it, and no token sees a later one."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kvik.errors import ConfigError, ContextError, UsageError
from kvik.models.operators import Cost, Form, Grid, Line, geometry, grid, make
from kvik.models.operators.pairs import Pairs, mixed
from operators import HEAD, HEADS, SUBSETS, WIDTH, by_definition, drawn, inputs

EXACT = 1e-10
OPERATORS = [
    "attention", "attention:rotary", *(f"translution:{s}" for s in SUBSETS), *(f"lor:{s},2" for s in SUBSETS),
    "bucketed:qkv,8", "bucketed:v,5", "convolution:3",
]  # fmt: skip


def away(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("subset", SUBSETS)
def test_translution_is_its_formula_pair_by_pair(subset):
    operator, x = drawn(f"translution:{subset}", 9), inputs(9)
    assert away(operator.mix(x[None])[0], by_definition(operator, x)) < EXACT


@pytest.mark.parametrize("place", ["grid", "line"])
def test_where_both_sides_are_seen_queries_take_the_mirrored_set(place):
    """q_ij = x_i Wq[idx(j, i)], k_ij = x_j Wk[idx(i, j)], v_ij = x_j Wv[idx(i, j)]: arXiv:2510.10060's code."""
    form, n = Form.parse("translution:qkv"), 7
    where = grid(form, 2, 3) if place == "grid" else geometry(form, n, causal=False)
    operator = make(form, WIDTH, HEADS, HEAD, where).double().requires_grad_(False)
    x, table = inputs(n), where.table(n)
    wq, wk, wv = (operator.get_parameter(f"{name}.weight") for name in "qkv")
    out = []
    for i in range(n):
        q = torch.stack([(x[i] @ wq[table[j, i]]).view(HEADS, -1) for j in range(n)])
        k, v = (torch.stack([(x[j] @ w[table[i, j]]).view(HEADS, -1) for j in range(n)]) for w in (wk, wv))
        weights = ((q * k).sum(-1) * operator.scale).softmax(0)
        out.append((weights.unsqueeze(-1) * v).sum(0).flatten())
    assert away(operator.mix(x[None])[0], torch.stack(out)) < EXACT


def test_the_low_rank_form_is_its_formula():
    operator, x = drawn("lor:qkv,2", 9), inputs(9)
    o, n = operator, len(x)
    low = {name: getattr(o, f"{name}_low")(x) for name in "qkv"}

    def far(name, token, offset):
        return (low[name][token] @ o.get_parameter(f"{name}_rel.weight")[offset]).view(HEADS, -1)

    heads = {name: getattr(o, name)(x).view(n, HEADS, -1) for name in "qkv"}
    out = []
    for i in range(n):
        scores = torch.stack([
            ((heads["q"][i] * heads["k"][j]).sum(-1) + (far("q", i, i - j) * far("k", j, i - j)).sum(-1)) / 2 * o.scale
            for j in range(i + 1)
        ])  # fmt: skip
        weights = scores.softmax(0)[..., None]
        near = sum(weights[j] * heads["v"][j] for j in range(i + 1)).flatten()
        out.append((near + o.v_up(sum(weights[j] * far("v", j, i - j) for j in range(i + 1)).flatten())) / 2)
    assert away(o.mix(x[None])[0], torch.stack(out)) < EXACT


@pytest.mark.parametrize("word", ["translution:qkv", "translution:v", "bucketed:qk,6"])
@pytest.mark.parametrize("causal", [True, False])
def test_with_equal_offsets_it_is_self_attention(word, causal):
    attention, operator = drawn("attention", causal=causal), drawn(word, seed=3, causal=causal)
    for name in "qkv":
        weight = attention.get_parameter(f"{name}.weight")
        mine = operator.get_parameter(f"{name}.weight")
        mine.copy_(weight.t().expand_as(mine) if name in operator.relative else weight)
    x = inputs()[None]
    assert away(operator.mix(x), attention.mix(x)) < EXACT
    operator.get_parameter(f"{operator.relative[-1]}.weight")[0] += 0.1
    assert away(operator.mix(x), attention.mix(x)) > 1e-4


def test_rotary_attention_is_the_case_in_which_keys_are_turned_by_the_offset():
    rotary, operator = drawn("attention:rotary"), drawn("translution:k")
    for name in "qv":
        operator.get_parameter(f"{name}.weight").copy_(rotary.get_parameter(f"{name}.weight"))
    for offset in range(40):
        turned = rotary.turned(rotary.k.weight.t(), torch.full((WIDTH,), -offset))
        operator.k.weight[offset] = turned
    x = inputs()[None]
    assert away(operator.mix(x), rotary.mix(x)) < EXACT


def test_in_a_picture_too():
    x, plain = torch.randn(2, 13, WIDTH, dtype=torch.float64), "attention"
    attention, operator = (
        make(f, WIDTH, HEADS, HEAD, grid(f, 3, 4)).double() for f in (Form.parse(plain), Form.parse("translution:qkv"))
    )
    with torch.no_grad():
        for name in "qkv":
            mine = operator.get_parameter(f"{name}.weight")
            mine.copy_(attention.get_parameter(f"{name}.weight").t().expand_as(mine))
        assert away(operator.mix(x), attention.mix(x)) < EXACT


@pytest.mark.parametrize("side", [1, 3, 5])
def test_uniform_attention_over_a_kernel_is_conv2d(side):
    """Weights of 1 / k² times k²: the operator's own mixture, over the grid's offsets within the kernel."""
    height, width, reach = 5, 4, side // 2
    x = torch.randn(2, WIDTH, height, width, dtype=torch.float64)
    kernel = torch.randn(6, WIDTH, side, side, dtype=torch.float64)
    where = Grid(height, width)
    matrices = torch.randn(where.sets, WIDTH, 6, dtype=torch.float64)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):  # offset i - j: the kernel looks the other way
            index = (down + height - 1) * (2 * width - 1) + right + width - 1
            if 0 <= down + height - 1 < 2 * height - 1 and 0 <= right + width - 1 < 2 * width - 1:
                matrices[index] = kernel[:, :, reach - down, reach - right].t()
    rows = torch.cat((torch.zeros(2, 1, WIDTH), x.flatten(2).transpose(1, 2)), dim=1)
    at = torch.arange(height * width)
    row, column = at // width, at % width
    inside = (row[:, None] - row).abs().le(reach) & (column[:, None] - column).abs().le(reach)
    uniform = torch.zeros(2, 1, len(at) + 1, len(at) + 1, dtype=torch.float64)
    uniform[..., 1:, 1:] = inside.double() / side**2
    got = side**2 * mixed(uniform, rows, matrices, Pairs.of(where, len(at) + 1, x.device))
    want = functional.conv2d(x, kernel, padding=reach).flatten(2).transpose(1, 2)
    assert away(got[:, 1:], want) < EXACT


@pytest.mark.parametrize("side", [1, 3, 5])
def test_and_causally_conv1d(side):
    operator, x = drawn(f"convolution:{side}"), inputs()
    kernel = operator.v.weight.permute(2, 1, 0).flip(-1)  # offset 0 is the kernel's last
    want = functional.conv1d(functional.pad(x.t(), (side - 1, 0)), kernel).t()
    assert away(operator.mix(x[None])[0], want) < EXACT
    full = drawn("translution:v")
    full.v.weight[:side] = operator.v.weight
    uniform = torch.ones(40, 40, dtype=torch.float64).tril().triu(1 - side) / side
    assert away(side * mixed(uniform[None, None], x[None], full.v.weight, full.pairs(x[None]))[0], want) < EXACT


def test_the_convolution_of_a_picture_is_conv2d_and_its_class_token_a_mean():
    form = Form.parse("convolution:3")
    operator = make(form, WIDTH, HEADS, HEAD, grid(form, 4, 3)).double().requires_grad_(False)
    x = torch.randn(1, 13, WIDTH, dtype=torch.float64)
    kernel = operator.v.weight[:9].permute(2, 1, 0).view(-1, WIDTH, 3, 3).flip(2, 3)
    want = functional.conv2d(x[:, 1:].transpose(1, 2).view(1, WIDTH, 4, 3), kernel, padding=1)
    got = operator.mix(x)
    assert away(got[:, 1:], want.flatten(2).transpose(1, 2)) < EXACT
    own, taken = operator.v.weight[9], operator.v.weight[10]
    assert away(got[0, 0], (x[0, 0] @ own + x[0, 1:].sum(0) @ taken) / 13) < EXACT


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 2), (4, 4)])
def test_a_grids_table_is_its_definition(height, width):
    where, cells = Grid(height, width), [(r, c) for r in range(height) for c in range(width)]
    table = where.table(1 + len(cells)).tolist()
    assert where.sets == (2 * height - 1) * (2 * width - 1) + 3
    assert table[0][0] == where.sets - 3
    for a, (x, y) in enumerate(cells):
        assert (table[0][1 + a], table[1 + a][0]) == (where.sets - 2, where.sets - 1)
        for b, (u, v) in enumerate(cells):
            assert table[1 + a][1 + b] == (x - u + height - 1) * (2 * width - 1) + (y - v + width - 1)
    with pytest.raises(ContextError, match="are not the class token"):
        where.table(2 + len(cells))


def test_a_lines_table_is_its_definition():
    assert Line(4).table(4).tolist() == [[0, -1, -1, -1], [1, 0, -1, -1], [2, 1, 0, -1], [3, 2, 1, 0]]
    assert Line(3, causal=False).table(3).tolist() == [[0, 3, 4], [1, 0, 3], [2, 1, 0]]
    assert Line(9, starts=(0, 1, 3)).table(5)[4].tolist() == [2, 2, 1, 1, 0]
    assert Line(2, cut=True).table(4)[3].tolist() == [-1, -1, 1, 0]
    with pytest.raises(ContextError, match="matrices for"):
        Line(4).table(5)


@pytest.mark.parametrize("word", OPERATORS)
def test_changing_the_future_moves_nothing_before_it(word):
    operator, x = drawn(word), inputs()
    changed = x.clone()
    changed[25:] = torch.randn(15, WIDTH, dtype=torch.float64)
    before, after = (operator.mix(each[None])[0] for each in (x, changed))
    assert torch.equal(before[:25], after[:25]) and away(before[25:], after[25:]) > 1e-3
    both = drawn(word, causal=False)
    assert away(both.mix(x[None])[0, :25], both.mix(changed[None])[0, :25]) > 1e-4


@pytest.mark.parametrize("word", ["translution:qkv", "lor:qkv,2", "convolution:3"])
def test_products_that_are_computed_again_have_the_same_gradients(word):
    operator, x = drawn(word).requires_grad_(True), inputs()[None]
    found = []
    for again in (False, True):
        operator.recompute = again
        operator.zero_grad()
        operator(x).square().sum().backward()
        found.append([each.grad.clone() for each in operator.parameters()])
    assert all(away(a, b) < EXACT for a, b in zip(*found, strict=True))


def test_no_tensor_grows_with_pairs_times_weights():
    """The largest tensor of a forward pass: rows of 8 sets, and never [n, n, d, m]."""
    operator, x, sizes = drawn("translution:qkv"), inputs()[None], []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t))
            return out

    operator.pairs(x)
    with Sizes():
        operator.mix(x)
    weights = operator.q.weight.numel()
    assert max(sizes) <= max(weights, 8 * 40 * WIDTH, 40 * 40 * HEADS + HEADS) < 40 * 40 * WIDTH * WIDTH / 10


@pytest.mark.parametrize("word", OPERATORS)
def test_parameters_are_as_the_formula_counts_them(word):
    operator = drawn(word)
    cost = Cost(WIDTH, HEADS * HEAD, HEADS, operator.geometry.sets, Form.parse(word))
    own = sum(each.numel() for name, each in operator.named_parameters() if not name.startswith("o."))
    assert own == cost.parameters
    if not word.startswith(("bucketed", "convolution")):  # which keep a mark, and a few tokens alone
        assert cost.row == sum(s.heads * w for s in operator.shapes() for _, w in s.streams)


def test_a_whole_text_costs_what_its_steps_do():
    for word in ("translution:qkv", "translution:k", "lor:qkv,2", "attention", "convolution:3", "bucketed:qkv,8"):
        form = Form.parse(word)
        cost = Cost(WIDTH, WIDTH, HEADS, geometry(form, 64).sets, form)
        assert cost.whole(64) == sum(cost.step(n) for n in range(1, 65)), word


def test_words_are_read_and_written():
    for word in (*OPERATORS, "attention:learned", "bucketed:k,16"):
        assert str(Form.parse(word)) == word
    for word in (
        "",
        "attention:alibi",
        "translution",
        "translution:kq",
        "lor:qkv",
        "bucketed:qkv,0",
        "convolution:k,3",
    ):
        with pytest.raises(ConfigError, match="is none that kvik has"):
            Form.parse(word)


def test_repositorys_way_of_drawing_is_smaller():
    form = Form.parse("translution:q")
    ours, theirs = (make(form, 48, 2, 24, geometry(form, 8), init=init) for init in ("linear", "repo"))
    ratio = ours.q.weight.std() / theirs.q.weight.std()
    assert ratio.item() == pytest.approx(48**0.5, rel=0.05)


def test_what_sees_both_sides_keeps_nothing():
    for operator in (drawn("translution:qkv", causal=False), drawn("bucketed:qkv,4", causal=False)):
        with pytest.raises(UsageError, match="nothing to cache"):
            operator.shapes()


def test_the_page_shows_code_from_here():
    root = Path(__file__).parent.parent
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/translution.md").read_text(), flags=re.DOTALL)
    sources = [root / "tests/operators.py", root / "src/kvik/models/operators/translution.py"]
    known = {line.split("  # fmt")[0].strip() for path in sources for line in path.read_text().splitlines()}
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(lines) >= 20 and not [line for line in lines if line not in known]
