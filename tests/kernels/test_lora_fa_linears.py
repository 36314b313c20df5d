"""lora_fa_linears: the group form equals its layers one by one, in float64 terms, and saves one h."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kore_kernels as kk
from kore_kernels import dispatch
from kore_kernels.lora_fa_linears import reference

from .conftest import INTERPRETER
from .numbers import LAYOUTS, assert_accurate, bits, laid_out
from .test_lora_fa_linear import BF16, F16, F32, F64, Saved

PRECISIONS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)] + ([] if INTERPRETER else [(F64, F64)])


def group(n, d_in, d_outs, r, dtype=F32, adapter=F32):
    x = torch.randn(n, d_in).to(dtype)
    weights = [(torch.randn(d, d_in) / d_in**0.5).to(dtype) for d in d_outs]
    biases = [torch.randn(d).to(dtype) if i % 2 else None for i, d in enumerate(d_outs)]
    U = torch.linalg.qr(torch.randn(max(d_in, r), r))[0][:d_in].to(adapter)
    Rs = [(torch.randn(r, r) / r**0.5).to(adapter) for _ in d_outs]
    return x, weights, biases, U, Rs, [torch.randn(d, r).to(adapter) for d in d_outs]


def expression(x, weights, biases, U, Rs, Bs, scaling):
    h = x.to(U.dtype) @ U
    parts = zip(weights, biases, Rs, Bs)
    return [(F.linear(x, W, b) + scaling * F.linear(F.linear(h, R), B)).to(x.dtype) for W, b, R, B in parts]


def run(function, x, weights, biases, U, Rs, Bs, scaling, gs):
    x = x.detach().clone().requires_grad_()
    Bs = [B.detach().clone().requires_grad_() for B in Bs]
    ys = function(x, weights, biases, U, Rs, Bs, scaling)
    torch.autograd.backward(ys, [g.to(y.dtype) for g, y in zip(gs, ys)])
    return [*(y.detach() for y in ys), x.grad, *(B.grad for B in Bs)]


def double(arguments):
    return [a if a is None else a.double() if isinstance(a, torch.Tensor) else double(a) for a in arguments]


def check(*arguments, scaling=0.7):
    x, weights, _, U, _, _ = arguments
    gs = [torch.randn(*x.shape[:-1], W.shape[0]).to(x.dtype) for W in weights]
    got = run(kk.lora_fa_linears, *arguments, scaling, gs)
    plain = run(expression, *arguments, scaling, gs)
    exact = run(expression, *double(arguments), scaling, gs)
    reduction = sum(W.shape[0] for W in weights) + x.numel() + U.shape[1]
    for ours, theirs, truth in zip(got, plain, exact):
        assert_accurate(ours, theirs, truth, reduction)


@pytest.mark.parametrize(("dtype", "adapter"), PRECISIONS)
@pytest.mark.parametrize(
    "shape",
    [(0, 8, (6,), 3), (1, 1, (1, 1), 1), (17, 33, (29, 5, 31), 16), (140, 65, (50, 97), 23)],
)
def test_shapes_and_dtypes(backend, shape, dtype, adapter):
    check(*group(*shape, dtype, adapter))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout):
    x, *rest = group(12, 18, (20, 9), 5)
    check(laid_out(x, layout), *rest)


def test_equals_its_layers_one_by_one(backend):
    x, weights, biases, U, Rs, Bs = group(20, 18, (20, 9), 5)
    ys = kk.lora_fa_linears(x, weights, biases, U, Rs, Bs, 0.5)
    for y, W, b, R, B in zip(ys, weights, biases, Rs, Bs):
        torch.testing.assert_close(y, kk.lora_fa_linear(x, W, b, R @ U.T, B, 0.5))


def test_saves_one_h_for_the_group_and_never_x(backend):
    x, weights, biases, U, Rs, Bs = group(12, 18, (20, 9), 5)
    x.requires_grad_()
    for B in Bs:
        B.requires_grad_()
    with Saved() as saved:
        kk.lora_fa_linears(x, weights, biases, U, Rs, Bs)
    (h,) = saved.activations(*weights, U, *Rs, *Bs)
    torch.testing.assert_close(h, F.pad((x @ U).detach(), (0, 11)))


@pytest.mark.parametrize("needs", [(True, ()), (False, (0,)), (False, (1,)), (True, (1,))])
def test_only_the_gradients_that_are_asked_for(backend, needs):
    x, weights, biases, U, Rs, Bs = group(12, 18, (20, 9), 5)
    x.requires_grad_(needs[0])
    for i, B in enumerate(Bs):
        B.requires_grad_(i in needs[1])
    ys = kk.lora_fa_linears(x, weights, biases, U, Rs, Bs)
    sum(y.square().sum() for y in ys).backward()
    assert (x.grad is not None) == needs[0]
    assert [B.grad is not None for B in Bs] == [i in needs[1] for i in range(2)]


def test_an_output_that_is_not_used_costs_nothing(backend, monkeypatch):
    x, weights, biases, U, Rs, Bs = group(12, 18, (20, 9), 5)
    x.requires_grad_()
    Bs = [B.requires_grad_() for B in Bs]
    module, layers = dispatch.select("lora_fa_linears", x.device, x.dtype), []
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda gs, *rest: layers.append(len(gs)) or backward(gs, *rest))
    kk.lora_fa_linears(x, weights, biases, U, Rs, Bs)[1].sum().backward()
    expected = torch.autograd.grad(expression(x, weights, biases, U, Rs, Bs, 1.0)[1].sum(), (x, Bs[1]))
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(Bs[1].grad, expected[1])
    assert Bs[0].grad is None and layers == [1]


def test_gradients_of_some_outputs_for_some_parameters(backend):
    """Of y_0 and y_2, for B_1 and B_2: only the third layer's own gradient exists."""
    x, weights, biases, U, Rs, Bs = group(60, 33, (20, 9, 31), 5)
    for B in Bs[1:]:
        B.requires_grad_()
    arguments = (x, weights, biases, U, Rs, Bs)
    ours, theirs = (f(*arguments, 0.7) for f in (kk.lora_fa_linears, expression))
    ours, theirs = (torch.autograd.grad((ys[2] * 3).sum(), Bs[1:], allow_unused=True) for ys in (ours, theirs))
    assert ours[0] is theirs[0] is None
    torch.testing.assert_close(ours[1], theirs[1])


def test_repeats_bit_for_bit(backend):
    arguments = group(100, 33, (50, 40), 23, BF16, BF16)
    gs = [torch.randn(100, 50), torch.randn(100, 40)]
    for first, second in zip(*(run(kk.lora_fa_linears, *arguments, 0.5, gs) for _ in range(2))):
        assert torch.equal(bits(first), bits(second))


def test_autocast_casts_as_linear_does(backend):
    arguments = group(16, 18, (20, 9), 5)
    with torch.autocast("cpu", BF16):
        assert {y.dtype for y in kk.lora_fa_linears(*arguments)} == {BF16}


@pytest.mark.skipif(INTERPRETER, reason="float64")
def test_gradcheck(backend):
    x, weights, biases, U, Rs, Bs = double(group(4, 5, (6, 3), 3))
    inputs = [t.requires_grad_() for t in (x, *Bs)]
    for function in (kk.lora_fa_linears, lambda *a: reference.forward(*a)[0]):
        assert torch.autograd.gradcheck(lambda x, *Bs, f=function: tuple(f(x, weights, biases, U, Rs, Bs, 0.7)), inputs)


def test_opcheck():
    x, weights, _, U, Rs, Bs = group(6, 5, (7, 4), 3)
    x.requires_grad_()
    Bs[0].requires_grad_()
    arguments = (x.reshape(2, 3, 5), weights, [torch.randn(4)], [False, True], U, Rs, Bs, 0.5)
    torch.library.opcheck(torch.ops.kore.lora_fa_linears.default, arguments)


def test_compiles_into_one_graph():
    x, weights, biases, U, Rs, Bs = group(6, 5, (7, 4), 3)
    Bs = [B.requires_grad_() for B in Bs]

    def loss(function, x):
        return sum(y.square().sum() for y in function(x, weights, biases, U, Rs, Bs, 0.5))

    compiled = torch.compile(lambda x: loss(kk.lora_fa_linears, x), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(expression, x), Bs)
    for ours, theirs in zip(torch.autograd.grad(compiled(x), Bs), expected):
        torch.testing.assert_close(ours, theirs)


def _bad(**changes):
    names = ("x", "weights", "biases", "U", "Rs", "Bs")
    return {**dict(zip(names, group(6, 5, (7, 4), 3))), **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(weights=[]), ValueError, "weights, biases, Rs and Bs need one entry for each layer"),
        (_bad(biases=[None]), ValueError, r"weights, biases, Rs and Bs need one entry.*\[2, 1, 2, 2\]"),
        (_bad(U=torch.randn(5, 3, requires_grad=True)), ValueError, "U requires grad, but it will not be trained"),
        (_bad(U=torch.randn(6, 3)), ValueError, r"U must have shape \(5, 3\)"),
        (_bad(Rs=[torch.randn(3, 3), torch.randn(3, 2)]), ValueError, r"Rs\[1\] must have shape \(3, 3\)"),
        (_bad(Rs=[torch.randn(3, 3, requires_grad=True)] * 2), ValueError, r"Rs\[0\] requires grad"),
        (_bad(Bs=[torch.randn(7, 3), torch.randn(7, 3)]), ValueError, r"Bs\[1\] must have shape \(4, 3\)"),
        (_bad(Bs=[torch.randn(7, 3), None]), TypeError, r"Bs\[1\] must be a tensor"),
        (_bad(weights=[torch.randn(7, 5), torch.randn(4, 6)]), ValueError, r"weights\[1\] must have shape"),
        (_bad(biases=[None, torch.randn(5)]), ValueError, r"biases\[1\] must have shape \(4,\)"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"lora_fa_linears: {message}"):
        kk.lora_fa_linears(**arguments)
