"""Merged mode of lora_fa_linear: W' = W + s B A in a temporary, and what that rounds away."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kore_kernels as kk
from kore_kernels.lora_fa_linear import reference

from .conftest import INTERPRETER
from .numbers import LAYOUTS, assert_accurate, bits, laid_out
from .test_lora_fa_linear import BF16, F16, F32, F64, PRECISIONS, RANKS, SHAPES, Saved, layer, run


def fused(*arguments):
    return kk.lora_fa_linear(*arguments, merged=True)


class Expression(torch.autograd.Function):
    """The same in plain PyTorch: a linear layer of the merged weight, and LoRA's gradient of B."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        merged = (weight + scaling * (B @ A)).to(weight.dtype)
        ctx.save_for_backward(x, merged, A)
        ctx.scaling = scaling
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx, g):
        x, merged, A = ctx.saved_tensors
        rows, columns = g.reshape(-1, merged.shape[0]).to(A.dtype), x.reshape(-1, merged.shape[1]).to(A.dtype)
        return g @ merged, None, None, None, ctx.scaling * (rows.T @ (columns @ A.T)), None


def check(x, weight, bias, A, B, scaling=0.7):
    g = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    got = run(fused, x, weight, bias, A, B, scaling, g)
    plain = run(Expression.apply, x, weight, bias, A, B, scaling, g)
    exact = run(Expression.apply, *(t if t is None else t.double() for t in (x, weight, bias, A, B)), scaling, g)
    for ours, theirs, truth, n in zip(got, plain, exact, (*weight.T.shape, x.numel())):
        assert_accurate(ours, theirs, truth, n)


@pytest.mark.parametrize(("dtype", "adapter"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(backend, shape, dtype, adapter):
    check(*layer(*shape, dtype, adapter))


@pytest.mark.parametrize("r", RANKS)
def test_ranks(backend, r):
    check(*layer(40, 33, 35, r))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    check(laid_out(x, layout), weight.T.contiguous().T, bias, A.T.contiguous().T, laid_out(B, "columns"))


@pytest.mark.skipif(INTERPRETER, reason="float64")
def test_equals_the_exact_mode_in_float64(backend):
    arguments, g = layer(17, 33, 29, 16, F64, F64), torch.randn(17, 29)
    for ours, theirs in zip(run(fused, *arguments, 0.7, g), run(kk.lora_fa_linear, *arguments, 0.7, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(INTERPRETER, reason="its casts to bfloat16 truncate")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_factors_are_rounded_once(backend, dtype):
    """An update just above half a unit of W's last place rounds up; rounded to W's dtype first, it would be half."""
    x, weight = torch.eye(16).to(dtype), torch.ones(8, 16).to(dtype)
    unit = torch.finfo(dtype).eps
    y = kk.lora_fa_linear(x, weight, None, torch.full((1, 16), 0.5 + 2**-13), torch.full((8, 1), unit), merged=True)
    assert torch.equal(y, torch.full((16, 8), 1 + unit).to(dtype))


def test_saves_h_and_only_h(backend):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    x.requires_grad_()
    B.requires_grad_()
    with Saved() as saved:
        y = fused(x, weight, bias, A, B)
    (h,) = saved.activations(weight, A, B)
    torch.testing.assert_close(h, F.pad((x @ A.T).detach(), (0, 11)))
    y.sum().backward()


def test_forms_no_h_that_nobody_needs(backend):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    with Saved() as saved:
        y = fused(x.requires_grad_(), weight, bias, A, B)
    assert not saved.activations(weight, A, B)
    y.sum().backward()
    assert x.grad.shape == x.shape

    with Saved() as saved:
        y = fused(x.detach(), weight, bias, A, B.requires_grad_())
    assert {t.data_ptr() for t in saved.tensors}.isdisjoint({weight.data_ptr(), A.data_ptr(), x.data_ptr()})
    y.sum().backward()
    assert B.grad.shape == B.shape


def test_repeats_bit_for_bit_and_leaves_its_arguments(backend):
    arguments, g = layer(150, 33, 50, 23, BF16, BF16), torch.randn(150, 50)
    before = [t.clone() for t in arguments]
    for first, second in zip(*(run(fused, *arguments, 0.5, g) for _ in range(2))):
        assert torch.equal(bits(first), bits(second))
    assert all(torch.equal(t, b) for t, b in zip(arguments, before))


def test_autocast_casts_as_linear_does(backend):
    x, weight, bias, A, B = layer(16, 18, 20, 5)
    B.requires_grad_()
    with torch.autocast("cpu", BF16):
        y = fused(x.requires_grad_(), weight, bias, A, B)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert x.grad.dtype == B.grad.dtype == F32


@pytest.mark.skipif(INTERPRETER, reason="float64")
def test_gradcheck_of_x_and_the_gradient_of_B(backend):
    x, weight, bias, A, B = (t.double() for t in layer(4, 5, 6, 3))
    x.requires_grad_()
    B.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, B: fused(x, weight, bias, A, B, 0.7), (x, B))
    assert torch.autograd.gradcheck(
        lambda x, B: reference.merged_forward(x, weight, bias, A, B, 0.7, True), (x, B.detach())
    )


class TestRegistration:
    @pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)])
    def test_opcheck(self, grads):
        x, weight, bias, A, B = layer(6, 5, 7, 3)
        arguments = (x.reshape(2, 3, 5).requires_grad_(grads[0]), weight, bias, A, B.requires_grad_(grads[1]), 0.5)
        torch.library.opcheck(torch.ops.kore.lora_fa_linear_merged.default, (*arguments, grads[1]))

    def test_opcheck_backward(self):
        x, weight, _, A, B = layer(6, 5, 7, 3)
        g, h = torch.randn(6, 7), F.pad(x @ A.T, (0, 13))
        for arguments in ((g, weight, A, B, h, 0.5), (g, None, None, B, h, 0.5), (g, weight, A, B, None, 0.5)):
            torch.library.opcheck(torch.ops.kore.lora_fa_linear_merged_backward.default, arguments)

    def test_compiles_into_one_graph(self):
        _, weight, bias, A, B = layer(6, 5, 7, 3)
        B.requires_grad_()
        function = lambda x: fused(torch.tanh(x), weight, bias, A, B, 0.5).square().sum()  # noqa: E731
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 5, requires_grad=True)
        for ours, theirs in zip(torch.autograd.grad(compiled(x), (x, B)), torch.autograd.grad(function(x), (x, B))):
            torch.testing.assert_close(ours, theirs)
