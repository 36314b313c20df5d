"""covariance_update_: numbers against float64, what it may touch, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import kore_kernels as kk

from .conftest import INTERPRETER
from .numbers import LAYOUTS, assert_accurate, bits, laid_out

SHAPES = [(0, 5), (1, 1), (3, 1), (1, 7), (5, 17), (64, 32), (67, 33), (131, 97)]
LARGER_THAN_A_BLOCK = [] if INTERPRETER else [(700, 300), (2100, 521)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def half(matrix: torch.Tensor, triangle: str) -> torch.Tensor:
    return matrix.tril() if triangle == "lower" else matrix.triu()


def start(d: int, dtype: torch.dtype = torch.float32, triangle: str = "lower") -> torch.Tensor:
    """A running sum: random in its triangle, NaN in the other, where nobody may look."""
    C = torch.randn(d, d, dtype=dtype)
    return torch.where(half(torch.ones(d, d, dtype=torch.bool), triangle), C, torch.nan)


def exact_and_plain(C, x, mask=None, weight=None, alpha=1.0, triangle="lower"):
    """The triangle in float64, and as one PyTorch expression in C's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    kept = rows if mask is None else rows[mask.reshape(-1)]
    w = torch.ones(len(rows)) if weight is None else weight.reshape(-1)
    w = w if mask is None else w[mask.reshape(-1)]
    results = []
    for dtype in (torch.float64, C.dtype):
        k = kept.to(dtype)
        before = half(C.to(dtype), triangle).nan_to_num()
        results.append(half(before + float(alpha) * (k * w.to(dtype)[:, None]).T @ k, triangle))
    return results


def check(C, x, **options):
    triangle = options.get("triangle", "lower")
    before, x_before = C.clone(), x.clone()
    exact, plain = exact_and_plain(C, x, **options)
    assert kk.covariance_update_(C, x, **options) is C
    assert_accurate(half(C, triangle), plain, exact, x.numel() // max(1, x.shape[-1]))
    other = ~half(torch.ones_like(C, dtype=torch.bool), triangle)
    assert torch.equal(bits(C)[other], bits(before)[other])
    assert torch.equal(bits(x), bits(x_before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES + LARGER_THAN_A_BLOCK)
def test_shapes_and_dtypes(backend, n, d, dtype):
    check(start(d), torch.randn(n, d).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layouts(backend, layout, dtype):
    check(start(37), laid_out(torch.randn(50, 37).to(dtype), layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_mask_weight_and_alpha(backend, dtype, weighted, masked):
    x = torch.randn(3, 25, 41).to(dtype)
    mask = torch.rand(3, 25) > 0.4 if masked else None
    weight = torch.randn(3, 25) if weighted else None
    if masked:
        x[~mask] = torch.nan
        x[0, 0], mask[0, 0] = torch.inf, False
    if weighted and masked:
        weight[~mask] = torch.nan
    for alpha in (1.0, -0.37, torch.tensor(0.25), torch.tensor(2.0, dtype=torch.bfloat16)):
        check(start(41), x, mask=mask, weight=weight, alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(5, 17), (131, 97), *LARGER_THAN_A_BLOCK])
def test_upper_triangle(backend, n, d, dtype):
    x, mask = torch.randn(n, d).to(dtype), torch.rand(n) > 0.3
    check(start(d, triangle="upper"), x, triangle="upper")
    check(start(d, triangle="upper"), x, triangle="upper", mask=mask, weight=torch.randn(n), alpha=-0.5)


def test_two_matrices_in_one_buffer(backend):
    """As capture packs them: each stays apart from the other, and together they fill (d + 1, d)."""
    d = 45
    buffer, x, y = torch.zeros(d + 1, d), torch.randn(60, d), torch.randn(70, d)
    for _ in range(2):
        kk.covariance_update_(buffer[1:], x, triangle="lower")
        kk.covariance_update_(buffer[:d], y, triangle="upper")
    first = kk.covariance_update_(kk.covariance_update_(torch.zeros(d, d), x), x)
    second = kk.covariance_update_(torch.zeros(d, d), y, triangle="upper")
    kk.covariance_update_(second, y, triangle="upper")
    assert torch.equal(buffer[1:].tril(), first)
    assert torch.equal(buffer[:d].triu(), second)


@pytest.mark.parametrize("strided", ["mask", "weight"])
def test_strided_mask_and_weight(backend, strided):
    x = torch.randn(20, 6)
    rows = {"mask": torch.rand(40) > 0.5, "weight": torch.rand(40)}[strided][::2]
    check(start(6), x, **{strided: rows})


def test_a_mask_that_keeps_nothing_or_everything(backend):
    x = torch.full((9, 5), torch.nan)
    C = start(5)
    before = C.clone()
    kk.covariance_update_(C, x, mask=torch.zeros(9, dtype=torch.bool))
    assert torch.equal(C.tril(), before.tril())
    check(start(5), torch.randn(9, 5), mask=torch.ones(9, dtype=torch.bool))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_kept_rows_that_are_not_finite_propagate(backend, bad, weighted, alpha):
    x = torch.randn(40, 35)
    x[7, 33] = bad
    C = torch.zeros(35, 35)
    kk.covariance_update_(C, x, weight=torch.rand(40) if weighted else None, alpha=alpha)
    touched = ~C.tril().isfinite()
    expected = torch.zeros_like(touched)
    expected[33, :34] = expected[34, 33] = True
    assert torch.equal(touched, expected)


def test_repeats_bit_for_bit(backend):
    x, weight = torch.randn(300, 70), torch.rand(300)
    runs = [kk.covariance_update_(torch.zeros(70, 70), x, weight=weight) for _ in range(2)]
    assert torch.equal(bits(runs[0]), bits(runs[1]))


@pytest.mark.skipif(INTERPRETER, reason="float64 has no Triton kernel")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_float64_accumulation(backend, dtype):
    check(start(37, torch.float64), torch.randn(90, 37).to(dtype))
    check(start(37, torch.float64), torch.randn(90, 37).to(dtype), weight=torch.randn(90), mask=torch.rand(90) > 0.5)


def test_autocast_does_not_lower_the_precision(backend):
    x = torch.randn(64, 33)
    with torch.autocast("cpu", torch.bfloat16):
        check(start(33), x)


def test_no_gradient_flows(backend):
    x = torch.randn(8, 4, requires_grad=True)
    C = kk.covariance_update_(torch.zeros(4, 4), x)
    assert not C.requires_grad


def test_inference_mode(backend):
    with torch.inference_mode():
        C, x = torch.zeros(6, 6), torch.randn(9, 6)
        check(C, x)
    check(torch.zeros(6, 6), x)


def _bad(**changes):
    good = {"C": torch.zeros(4, 4), "x": torch.randn(6, 4), "mask": None, "weight": None, "alpha": 1.0}
    return {**good, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(C=[[1.0]]), TypeError, "C must be a tensor, got list"),
        (_bad(C=torch.zeros(4, 4, dtype=torch.float16)), TypeError, "C must be float32 or float64, got float16"),
        (_bad(C=torch.zeros(4, 3)), ValueError, r"C must be a square matrix .*\(4, 3\)"),
        (_bad(C=torch.zeros(4)), ValueError, "C must be a square matrix"),
        (_bad(C=torch.zeros(4, 8)[:, ::2]), ValueError, "C must be contiguous"),
        (_bad(C=torch.zeros(4, 4, requires_grad=True)), ValueError, "C .* must not require grad"),
        (_bad(x=torch.randn(6, 5)), ValueError, r"x must have shape \(\.\.\., 4\).*\(6, 5\)"),
        (_bad(x=torch.tensor(1.0)), ValueError, "x must have shape"),
        (_bad(x=torch.ones(6, 4, dtype=torch.int64)), TypeError, "x must be .*got int64"),
        (_bad(x=torch.randn(6, 4, dtype=torch.float64)), TypeError, "x must be .*got float64"),
        (_bad(x=torch.empty(6, 4, device="meta")), ValueError, "x must be on C's device cpu, got meta"),
        (_bad(mask=torch.ones(6)), TypeError, "mask must be bool, got float32"),
        (_bad(mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask must have shape \(6,\).*got \(5,\)"),
        (_bad(weight=torch.ones(6, 1)), ValueError, "weight must have shape"),
        (_bad(weight=torch.ones(6, dtype=torch.int32)), TypeError, "weight must be"),
        (_bad(alpha="1"), TypeError, "alpha must be a number"),
        (_bad(alpha=torch.ones(1)), ValueError, r"alpha must have shape \(\)"),
        (_bad(alpha=torch.tensor(1)), TypeError, "alpha must be"),
        (_bad(triangle="L"), ValueError, "triangle must be 'lower' or 'upper', got 'L'"),
    ],
)
def test_bad_input_names_the_argument_and_leaves_C(arguments, error, message):
    C, x = arguments.pop("C"), arguments.pop("x")
    before = C.clone() if isinstance(C, torch.Tensor) else None
    with pytest.raises(error, match=f"covariance_update_: {message}"):
        kk.covariance_update_(C, x, **arguments)
    assert before is None or torch.equal(C, before)


def test_opcheck():
    op = torch.ops.kore.covariance_update_.default
    x, mask, weight = torch.randn(9, 5), torch.rand(9) > 0.5, torch.rand(9)
    torch.library.opcheck(op, (torch.zeros(5, 5), x, None, None, 0.5, None, "lower"))
    torch.library.opcheck(op, (torch.zeros(5, 5), x, mask, weight, 1.0, torch.tensor(0.5), "upper"))


def test_compiles_into_one_graph():
    def update(C, x, mask):
        kk.covariance_update_(C, 2 * x, mask=mask, alpha=0.5)
        return C.diagonal() + 1

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for n in (8, 13):
        x, mask = torch.randn(n, 6), torch.rand(n) > 0.5
        C, expected = torch.zeros(6, 6), torch.zeros(6, 6)
        assert torch.equal(compiled(C, x, mask), update(expected, x, mask))
        assert torch.equal(C, expected)
