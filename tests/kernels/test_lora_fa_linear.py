"""lora_fa_linear: output and gradients against float64, what it saves, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kore_kernels as kk
from kore_kernels.lora_fa_linear import reference

from .conftest import INTERPRETER
from .numbers import LAYOUTS, assert_accurate, bits, laid_out

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(0, 8, 6, 3), (1, 1, 1, 1), (3, 5, 7, 1), (17, 33, 29, 16), (70, 65, 50, 23), (131, 40, 97, 37)]
RANKS = [1, 7, 16, 100] if INTERPRETER else [1, 7, 16, 100, 235, 274, 512]
PRECISIONS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)] + ([] if INTERPRETER else [(F64, F64)])


def layer(n, d_in, d_out, r, dtype=F32, adapter=F32, bias=True):
    x = torch.randn(n, d_in).to(dtype)
    weight = (torch.randn(d_out, d_in) / max(d_in, 1) ** 0.5).to(dtype)
    A = (torch.randn(r, d_in) / max(d_in, 1) ** 0.5).to(adapter)
    return x, weight, torch.randn(d_out).to(dtype) if bias else None, A, torch.randn(d_out, r).to(adapter)


def expression(x, weight, bias, A, B, scaling):
    """The unfused PyTorch expression in the arguments' own dtypes."""
    return (F.linear(x, weight, bias) + scaling * F.linear(F.linear(x.to(A.dtype), A), B)).to(x.dtype)


def run(function, x, weight, bias, A, B, scaling, g):
    """(y, dx, dB) of a function of these arguments."""
    x, B = x.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    y = function(x, weight, bias, A, B, scaling)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, B.grad


def check(x, weight, bias, A, B, scaling=0.7):
    g = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    arguments = (x, weight, bias, A, B)
    before = [t if t is None else t.clone() for t in arguments]
    got = run(kk.lora_fa_linear, *arguments, scaling, g)
    plain = run(expression, *arguments, scaling, g)
    exact = run(expression, *(t if t is None else t.double() for t in arguments), scaling, g)
    (n, d_out), d_in, r = (x.numel() // max(x.shape[-1], 1), weight.shape[0]), weight.shape[1], A.shape[0]
    for ours, theirs, truth, reduction in zip(got, plain, exact, (d_in + r, d_out + r, n)):
        assert_accurate(ours, theirs, truth, reduction)
    assert all(t is b is None or torch.equal(bits(t), bits(b)) for t, b in zip(arguments, before))
    return got


@pytest.mark.parametrize(("dtype", "adapter"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(backend, shape, dtype, adapter):
    check(*layer(*shape, dtype, adapter))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("r", RANKS)
def test_ranks(backend, r, dtype):
    """With few rows and with so many that the CPU multiplies padded copies of A and B."""
    for n in (40, 200):
        check(*layer(n, 33, 35, r, dtype, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    check(
        laid_out(x, layout),
        weight.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
        A.T.contiguous().T,
        laid_out(B, "columns"),
    )


def test_without_bias_and_with_integer_scaling(backend):
    check(*layer(9, 12, 10, 4, bias=False), scaling=2)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "columns"])
def test_incoming_gradient_of_any_layout(backend, layout):
    x, weight, bias, A, B = layer(21, 12, 10, 4)
    g = laid_out(torch.randn(21, 10), layout)
    for ours, theirs in zip(run(kk.lora_fa_linear, x, weight, bias, A, B, 1.0, g),
                            run(expression, x, weight, bias, A, B, 1.0, g)):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(backend, bad):
    x, weight, bias, A, B = layer(40, 33, 20, 23)
    x[5, 3] = bad
    y = kk.lora_fa_linear(x, weight, bias, A, B)
    assert not y[5].isfinite().any() and y[:5].isfinite().all() and y[6:].isfinite().all()


def test_repeats_bit_for_bit(backend):
    arguments = layer(150, 33, 50, 23, BF16, BF16)
    g = torch.randn(150, 50)
    for first, second in zip(*(run(kk.lora_fa_linear, *arguments, 0.5, g) for _ in range(2))):
        assert torch.equal(bits(first), bits(second))


class Saved:
    """The tensors that autograd keeps for the backward pass."""

    def __enter__(self):
        self.tensors = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)

    def _pack(self, tensor):
        self.tensors.append(tensor)
        return tensor

    def activations(self, *parameters):
        pointers = {p.data_ptr() for p in parameters}
        return [t for t in self.tensors if t.data_ptr() not in pointers]


def test_saves_h_and_never_x(backend):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    x.requires_grad_()
    B.requires_grad_()
    with Saved() as saved:
        y = kk.lora_fa_linear(x, weight, bias, A, B)
    (h,) = saved.activations(weight, A, B)
    assert h.shape == (12, 16)
    torch.testing.assert_close(h, F.pad((x @ A.T).detach(), (0, 11)))
    y.sum().backward()


def test_saves_and_computes_only_what_is_asked_for(backend, monkeypatch):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    with Saved() as saved:
        y = kk.lora_fa_linear(x, weight, bias, A, B.requires_grad_())
    assert {t.data_ptr() for t in saved.tensors}.isdisjoint({weight.data_ptr(), A.data_ptr(), x.data_ptr()})
    y.sum().backward()
    assert x.grad is None and B.grad.shape == B.shape

    with Saved() as saved:
        y = kk.lora_fa_linear(x.requires_grad_(), weight, bias, A, B.detach())
    assert not saved.activations(weight, A, B)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.skipif(INTERPRETER, reason="float64")
def test_gradcheck(backend):
    x, weight, bias, A, B = (t.double() for t in layer(4, 5, 6, 3))
    x.requires_grad_()
    B.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, B: kk.lora_fa_linear(x, weight, bias, A, B, 0.7), (x, B))
    assert torch.autograd.gradcheck(lambda x, B: reference.forward(x, weight, bias, A, B, 0.7)[0], (x, B))


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_float32_factors_are_not_rounded(backend, adapter):
    """Beside a bfloat16 x, the gradient of a float32 B has float32 accuracy, that of a bfloat16 B has not."""
    x, weight, bias, A, B = layer(64, 33, 30, 8, BF16, F32)
    g = torch.randn(64, 30).to(BF16)
    _, _, dB = run(kk.lora_fa_linear, x, weight, bias, A.to(adapter), B.to(adapter), 1.0, g)
    exact = g.double().T @ (x.double() @ A.double().T)
    error = ((dB.double() - exact).abs().max() / exact.abs().max()).item()
    assert dB.dtype == adapter
    assert (error < 1e-5) == (adapter == F32)


@pytest.mark.parametrize("model", [F32, BF16])
def test_autocast_casts_as_linear_does(backend, model):
    x, weight, bias, A, B = layer(16, 18, 20, 5, model, F32)
    x.requires_grad_()
    B.requires_grad_()
    with torch.autocast("cpu", BF16):
        y = kk.lora_fa_linear(x, weight, bias, A, B)
        assert y.dtype == F.linear(x, weight, bias).dtype == BF16
    y.float().square().sum().backward()
    assert x.grad.dtype == model and B.grad.dtype == F32


class TestRegistration:
    @pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)])
    def test_opcheck(self, grads):
        x, weight, bias, A, B = layer(6, 5, 7, 3)
        arguments = (x.reshape(2, 3, 5).requires_grad_(grads[0]), weight, bias, A, B.requires_grad_(grads[1]), 0.5)
        arguments += (0.0, None)
        torch.library.opcheck(torch.ops.kore.lora_fa_linear.default, arguments)

    def test_opcheck_backward(self):
        x, weight, _, A, B = layer(6, 5, 7, 3)
        g, h = torch.randn(6, 7), F.pad(x @ A.T, (0, 13))
        for arguments in ((g, weight, A, B, h, 0.5), (g, None, None, B, h, 0.5), (g, weight, A, B, None, 0.5)):
            torch.library.opcheck(torch.ops.kore.lora_fa_linear_backward.default, (*arguments, 0.0, None))

    def test_compiles_into_one_graph(self):
        _, weight, bias, A, B = layer(6, 5, 7, 3)
        B.requires_grad_()
        compiled = torch.compile(
            lambda x: kk.lora_fa_linear(torch.tanh(x), weight, bias, A, B, 0.5).square().sum(),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        for shape in ((4, 5), (2, 3, 5), (7, 5)):
            x = torch.randn(shape, requires_grad=True)
            B.grad = None
            compiled(x).backward()
            torch.testing.assert_close(
                B.grad,
                torch.autograd.grad(expression(torch.tanh(x), weight, bias, A, B, 0.5).square().sum(), B)[0],
            )

    def test_gradient_checkpointing(self):
        x, weight, bias, A, B = layer(6, 5, 7, 3)
        x.requires_grad_()
        B.requires_grad_()
        y = torch.utils.checkpoint.checkpoint(kk.lora_fa_linear, x, weight, bias, A, B, use_reentrant=False)
        plain = expression(x, weight, bias, A, B, 1.0)
        for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, B)), torch.autograd.grad(plain.sum(), (x, B))):
            torch.testing.assert_close(ours, theirs)


def _bad(**changes):
    x, weight, bias, A, B = layer(6, 5, 7, 3)
    return {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(x=None), TypeError, "x must be a tensor"),
        (_bad(x=torch.ones(6, 5, dtype=torch.int64)), TypeError, "x must be .*got int64"),
        (_bad(x=torch.tensor(1.0)), ValueError, "weight must have shape"),
        (_bad(x=torch.randn(6, 4)), ValueError, r"weight must have shape \(d_out, d_in\) and x shape .*\(6, 4\)"),
        (_bad(weight=torch.randn(7, 5).bfloat16()), TypeError, "weight must be float32, got bfloat16"),
        (_bad(weight=torch.randn(7, 5, requires_grad=True)), ValueError, "weight requires grad, but it will not be tr"),
        (_bad(weight=torch.empty(7, 5, device="meta")), ValueError, "weight must be on x's device"),
        (_bad(bias=torch.randn(5)), ValueError, r"bias must have shape \(7,\)"),
        (_bad(bias=torch.randn(7, requires_grad=True)), ValueError, "bias requires grad, but it will not be trained"),
        (_bad(A=torch.randn(3, 5, requires_grad=True)), ValueError, "A requires grad, but it will not be trained"),
        (_bad(A=torch.randn(4, 5)), ValueError, r"A must have shape \(3, 5\)"),
        (_bad(A=torch.randn(3, 6)), ValueError, r"A must have shape \(3, 5\)"),
        (_bad(A=torch.randn(3, 5).bfloat16()), TypeError, "A must be float32, got bfloat16"),
        (_bad(A=torch.randn(5)), ValueError, "A must be a matrix"),
        (_bad(B=torch.randn(8, 3)), ValueError, r"B must have shape \(7, 3\)"),
        (_bad(B=torch.randn(7, 3).double()), TypeError, "B must have A's dtype"),
        (_bad(B=torch.empty(7, 3, device="meta")), ValueError, "B must be on x's device"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"lora_fa_linear: {message}"):
        kk.lora_fa_linear(**arguments)


def test_parameters_that_require_grad_are_fine_without_autograd():
    x, weight, bias, A, B = layer(6, 5, 7, 3)
    with torch.no_grad():
        kk.lora_fa_linear(x, weight.requires_grad_(), bias, A.requires_grad_(), B)
