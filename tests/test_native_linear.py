"""The native products and functions of rows: against float64, and the same bits beside any rows, on any threads, at any
address, with every instruction set that the machine has.

Bounds. A row's codes are off by at most half a step of max|x| / 127 in each group of 32, so that a product is off by at
most Σ over groups of max|x| / 254 · Σ|w|; sums in f32 add at most 1e-6 of Σ|x||w|. Against the rounded rows themselves
only the latter is left.
"""

import math

import pytest
import torch

from kvik.errors import UsageError, WeightsError
from kvik.ops import loader, pointwise
from kvik.ops.grouped import GroupQuantized
from kvik.ops.linear import Linear
from kvik.ops.pointwise import GELU, LayerNorm, RMSNorm, SwiGLU

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 3, 5, 16, 17, 64, 513)
SHAPES = ((1, 32), (16, 64), (37, 50), (3, 7), (129, 33), (96, 160), (320, 576))  # outputs, inputs
module = loader.native()
pytestmark = pytest.mark.skipif(module is None, reason="kvik was built without its native part, or it is switched off")
formats = pytest.mark.parametrize("fmt", ["int8", "int4"])


@pytest.fixture
def threads():
    """A function that sets how many threads work."""
    before = module.threads()
    yield module.set_threads
    module.set_threads(before)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(outputs, inputs, fmt, bias=False, seed=0):
    """(a Linear; its weight as it is held, in float64; its bias)."""
    offset = drawn(outputs, seed=seed + 1) if bias else None
    made = Linear(drawn(outputs, inputs, seed=seed) / inputs**0.5, offset, fmt, CPU)
    return made, made.rows(torch.arange(outputs)).double(), torch.zeros(outputs) if offset is None else offset


def rounded(x):
    """(rows as a product takes them, in float64; the size of half a step, f64 [T, K])."""
    inputs = x.shape[1]
    grouped = torch.nn.functional.pad(x, (0, -inputs % 32)).unflatten(1, (-1, 32))
    peak = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, 0)
    values = (grouped * inverse).round().double() * (peak / 127).double()
    return values.flatten(1)[:, :inputs], (peak.double() / 254).expand(grouped.shape).flatten(1)[:, :inputs]


def check_product(made, weight, bias, x, y):
    """y against float64, within the module's bounds."""
    near, half = rounded(x)
    size = near.abs() @ weight.abs().t() + bias.abs()
    assert ((y - (near @ weight.t() + bias)).abs() <= 1e-6 * size + 1e-30).all()
    allowed = half @ weight.abs().t() * 1.0001 + 1e-6 * size + 1e-30
    assert ((y - (x.double() @ weight.t() + bias)).abs() <= allowed).all()


@formats
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_equal_float64_and_a_rows_bits_depend_on_nothing_else(isa, outputs, inputs, fmt):
    made, weight, bias = linear(outputs, inputs, fmt, bias=outputs % 2 == 1)
    everything = drawn(513, inputs, seed=2) * drawn(513, 1, seed=3).exp()
    whole = made(everything)
    check_product(made, weight, bias, everything, whole)
    for rows in ROWS:
        assert torch.equal(made(everything[:rows]), whole[:rows]), f"{rows} rows"
        assert torch.equal(made(everything[513 - rows :]), whole[513 - rows :]), f"the last {rows} rows"


@formats
def test_threads_do_not_show(threads, fmt):
    made, *_ = linear(320, 576, fmt)
    swiglu, x = SwiGLU(), drawn(200, 1152)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append([made(x[:rows], after=swiglu) for rows in (1, 2, 17, 200)] + [swiglu(x)])
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))


@formats
def test_instruction_sets_do_not_show(fmt):
    before, found = module.isa(), []
    made, *_ = linear(129, 224, fmt, bias=True)
    x = drawn(21, 448) * 3
    functions = (SwiGLU(), GELU(), RMSNorm(drawn(448), 1e-5), LayerNorm(drawn(448), drawn(448), 1e-5))
    for name in module.available():
        module.use(name)
        found.append([made(x, after=functions[0]), made(x[:, :224]), *(f(x) for f in functions)])
    module.use(before)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], each, strict=True))


@formats
def test_addresses_and_strides_do_not_show(fmt):
    made, *_ = linear(48, 96, fmt)
    x = drawn(9, 96)
    want = made(x)
    for shift in (1, 3, 5):
        moved = torch.empty(9 * 96 + shift)[shift:].view(9, 96).copy_(x)
        assert torch.equal(made(moved), want)
    assert torch.equal(made(torch.cat((x, x), 1)[:, :96]), want)
    onto = torch.zeros(9, 50)
    assert torch.equal(made(x, onto=onto[:, 1:49]), want) and not onto[:, ::49].any()


@formats
def test_a_product_is_added_in_place(isa, fmt):
    made, *_ = linear(37, 50, fmt, bias=True)
    x, onto = drawn(11, 50), drawn(11, 37)
    want = onto + made(x)
    got = made(x, onto=onto)
    assert got is onto and torch.equal(got, want)


@formats
def test_a_function_on_the_way_is_the_function_before(isa, fmt):
    made, *_ = linear(40, 96, fmt)
    for function in (SwiGLU(), GELU(), RMSNorm(drawn(96), 1e-5), LayerNorm(drawn(96), drawn(96), 1e-5)):
        for rows in (1, 7, 300):
            x = drawn(rows, 96 * function.takes)
            assert torch.equal(made(x, after=function), made(function(x)))


@formats
def test_extreme_rows_stay_exact_and_to_themselves(isa, fmt):
    """Sums at the ends of their ranges, rows of zeros, of tiny and of huge values; NaN and inf reach no other row."""
    outputs, inputs = 19, 160
    codes = torch.randint(0, 2, (outputs, inputs), generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes[0], codes[1] = 1, -1
    extreme = codes * {"int8": 127.0, "int4": 7.5}[fmt]
    made = Linear(extreme, None, fmt, CPU)
    weight = made.rows(torch.arange(outputs)).double()
    assert torch.equal(weight, extreme.double()), "ends of a range are held exactly"
    signs = codes[2:9].float()
    ones = torch.ones(1, inputs)
    x = torch.cat((ones, -ones, signs, ones * 0, ones * 1e-25, signs * 3e30, ones * 2.0**-110))
    y = made(x)
    want, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    assert ((y - want).abs() <= 1e-6 * size + 1e-26).all()
    assert not y[9].any() and not y[-1].any(), "values below 2^-100 count as zeros"
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = x.clone()
        poisoned[4, 77] = bad
        got = made(poisoned)
        assert got[4].isnan().all()
        assert torch.equal(got[:4], y[:4]) and torch.equal(got[5:], y[5:])


def test_a_files_own_codes_and_scales_are_held_verbatim(isa):
    generator = torch.Generator().manual_seed(0)
    scale, zero = (torch.rand((21, 3), generator=generator).half() * 1e-3 for _ in "sz")
    codes = torch.randint(0, 256, (21, 48), generator=generator, dtype=torch.uint8)
    four = GroupQuantized(codes, scale, -zero, 4)
    assert torch.equal(Linear(four, None, "int4", CPU).rows(torch.arange(21)), four.dequantize())
    eight = GroupQuantized(codes.repeat(1, 2), scale, scale * -128, 8)
    assert torch.equal(eight.zero.float(), eight.scale.float() * -128)
    made = Linear(eight, None, "int8", CPU)
    assert torch.equal(made.rows(torch.arange(21)), eight.dequantize())
    x = drawn(5, 96)  # codes from -128 to 127: the lowest has no positive counterpart
    check_product(made, eight.dequantize().double(), torch.zeros(21), x, made(x))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
@formats
def test_weights_of_any_size_are_held_to_their_bits(fmt, size):
    weight = drawn(33, 70) * size
    held = Linear(weight, None, fmt, CPU).rows(torch.arange(33))
    assert (held - weight).abs().max() < weight.abs().max() * {"int8": 0.005, "int4": 0.07}[fmt]


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(WeightsError, match="not finite"):
        Linear(torch.full((4, 32), math.inf), None, "int8", CPU)


def test_looking_up_a_row_that_is_not_there_is_refused():
    made, *_ = linear(5, 32, "int8")
    for index in (-1, 5):
        with pytest.raises(IndexError):
            made.rows(torch.tensor([0, index]))


# Functions of rows.

WIDTHS = (1, 7, 16, 33, 576)


def check_function(function, x, want, relative):
    """Against float64; each row as if it were alone."""
    got = function(x)
    assert ((got - want).abs() <= relative * want.abs() + 1e-30).all()
    for row in (0, x.shape[0] // 2, x.shape[0] - 1):
        assert torch.equal(function(x[row : row + 1]), got[row : row + 1])


@pytest.mark.parametrize("width", WIDTHS)
def test_functions_of_rows_equal_float64(isa, width):
    x = drawn(40, width) * drawn(40, 1, seed=1).exp()
    wide, weight = x.double(), drawn(width, seed=2).abs() + 0.1
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    check_function(RMSNorm(weight, 1e-5), x, normed, 1e-6)
    both = torch.cat((x * 20, x), 1)
    gate, up = both.double().chunk(2, 1)
    check_function(SwiGLU(), both.contiguous(), gate * torch.sigmoid(gate) * up, 1e-6)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    check_function(
        GELU(), x, wide * torch.sigmoid(2 * inner), 1e-5
    )  # e^-2u has the rounding of 2u, up to 87, before it
    got = LayerNorm(weight, weight, 1e-5)(x)
    centred = torch.nn.functional.layer_norm(wide, (width,), weight.double(), weight.double(), 1e-5)
    assert (got - centred).abs().max() < 1e-5
    assert torch.equal(LayerNorm(weight, weight, 1e-5)(x[3:4]), got[3:4])


def test_the_exponential_is_exact_to_two_ten_millionths(isa):
    """Through silu of gates from -87 to 87 with an up of 1: the sigmoid's other steps add no more than its rounding."""
    gate = torch.linspace(-87, 87, 200_001).unsqueeze(0)
    got = SwiGLU()(torch.cat((gate, torch.ones_like(gate)), 1))
    want = gate.double() * torch.sigmoid(gate.double())
    assert ((got - want).abs() <= 4e-7 * want.abs()).all()


def test_activations_of_infinities_and_nan_are_torchs_or_their_limit(isa):
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1000.0, -1000.0, 0.0]])
    got = GELU()(x)[0]
    assert got[0] == math.inf and got[2].isnan() and got[3] == 1000 and abs(got[4]) < 1e-30 and got[5] == 0


def test_turning_equals_complex_products_and_stays_in_its_columns(isa):
    x = drawn(23, 5, 16)
    angles = torch.polar(torch.ones(23, 1, 8), drawn(23, 1, 8)).contiguous()
    want = torch.view_as_real(torch.view_as_complex(x[:, :3].unflatten(-1, (-1, 2)).contiguous()) * angles).flatten(-2)
    full = x.clone()
    got = pointwise.turn(full[:, :3], angles)
    assert (got - want).abs().max() < 1e-6
    assert torch.equal(full[:, 3:], x[:, 3:]) and torch.equal(full[:, :3], got)
    alone = x[7:8].clone()
    assert torch.equal(pointwise.turn(alone[:, :3], angles[7:8].contiguous()), got[7:8])


def test_gradients_flow_through_the_plain_form():
    x = drawn(4, 32).requires_grad_()
    (SwiGLU()(RMSNorm(torch.ones(32), 1e-5)(x)).sum()).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@formats
def test_a_gradient_through_codes_is_refused(fmt):
    made, *_ = linear(16, 32, fmt)
    x = drawn(2, 32).requires_grad_()
    with pytest.raises(WeightsError, match="no gradient"):
        made(x)
    with torch.no_grad():
        assert torch.equal(made(x), made(x.detach()))


# Choosing.


@pytest.mark.parametrize("chosen", [{}, {"KVIK_ISA": "baseline"}, {"KVIK_OPS": "reference"}])
def test_the_environment_chooses(monkeypatch, chosen):
    for name in ("KVIK_OPS", "KVIK_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    before = module.isa()
    loader.native.cache_clear()
    try:
        made, isa = Linear(drawn(64, 64), None, "int4", CPU), loader.native() and loader.native().isa()
    finally:
        loader.native.cache_clear()
        module.use(before)
    wanted = None if "KVIK_OPS" in chosen else chosen.get("KVIK_ISA", module.available()[-1])
    assert (made.arithmetic, isa) == ("torch packed" if wanted is None else "native", wanted)
    assert made(drawn(3, 64)).shape == (3, 64)


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("KVIK_ISA", "mmx")
    with pytest.raises(UsageError, match=r"KVIK_ISA='mmx' is not available here.*baseline"):
        loader.chosen()
    monkeypatch.setenv("KVIK_OPS", "fast")
    with pytest.raises(UsageError, match="KVIK_OPS='fast' is unknown"):
        loader.chosen()


def test_without_the_native_part_torch_multiplies(monkeypatch):
    monkeypatch.setattr(loader, "built", lambda: None)
    assert loader.chosen() is None
    monkeypatch.setenv("KVIK_OPS", "native")
    with pytest.raises(UsageError, match="KVIK_OPS=native: the kernels were not built"):
        loader.chosen()
