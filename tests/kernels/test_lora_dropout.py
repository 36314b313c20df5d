"""Dropout of lora_fa_linear: one mask from a seed in every backend, forward and backward, stored nowhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kore_kernels as kk
from kore_kernels.lora_fa_linear import dropout, reference

from .conftest import INTERPRETER
from .numbers import LAYOUTS, assert_accurate, bits, laid_out
from .test_lora_fa_linear import BF16, PRECISIONS, Saved, layer, run

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32]


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor([number])


def mask(x, p, seed) -> torch.Tensor:
    """The mask of x's rows, element by element from the definition's words."""
    n, d = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    return dropout.keep(seed, p, 0, n, d).view(x.shape)


def expression(p, seed):
    """The unfused PyTorch expression with this mask, in the arguments' own dtypes."""

    def dropped_lora(x, weight, bias, A, B, scaling):
        kept = torch.where(mask(x, p, seed), x, 0).to(A.dtype) / (1 - p)
        return (F.linear(x, weight, bias) + scaling * F.linear(F.linear(kept, A), B)).to(x.dtype)

    return dropped_lora


def fused(p, seed):
    return lambda *arguments: kk.lora_fa_linear(*arguments, dropout_p=p, seed=seed)


class TestMask:
    def test_philox_is_philox(self):
        """Known answers of Philox 4x32-10 (Random123)."""
        zero = seed_of(0)
        assert [int(w) for w in dropout.philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
    def test_rate(self, p):
        kept = dropout.keep(seed_of(3), p, 0, 500, 1000).double()
        tolerance = 5 * (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(kept.mean().item() - (1 - p)) < tolerance
        for part in (kept[:, c::4] for c in range(4)):
            assert abs(part.mean().item() - (1 - p)) < 2 * tolerance

    def test_rows_columns_and_seeds_are_independent(self):
        first, second = (dropout.keep(seed_of(s), 0.5, 0, 300, 300).double() - 0.5 for s in (5, 6))
        for other in (second, first.roll(1, 0), first.roll(1, 1), first.roll(4, 1), first.T):
            assert abs((first * other).mean().item()) < 5 / 4 / 300

    def test_a_row_does_not_depend_on_where_it_is_computed(self):
        whole = dropout.keep(seed_of(7), 0.3, 0, 40, 33)
        assert torch.equal(dropout.keep(seed_of(7), 0.3, 13, 9, 30), whole[13:22, :30])

    def test_the_largest_p_still_keeps_some(self):
        assert dropout.threshold(1 - 2**-40) == 2**31 - 1
        assert dropout.threshold(0.0) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_every_backend_draws_the_same_bits(backend, seed):
    """h of a layer whose A picks single columns is the dropped x itself."""
    n, d, p = 150, 133, 0.375
    x = torch.randn(n, d).to(BF16)
    A = torch.eye(d).to(BF16)
    _, h = torch.ops.kore.lora_fa_linear(x, torch.zeros(1, d, dtype=BF16), None, A, A[:1], 1.0, p, seed_of(seed))
    kept = mask(x, p, seed_of(seed))
    assert torch.equal(h[:, :d] != 0, kept & (x != 0))
    torch.testing.assert_close(h[:, :d], torch.where(kept, x, 0) / (1 - p))


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_the_backward_pass_draws_them_again(backend, seed):
    n, d, p = 150, 133, 0.375
    g, A, B = torch.ones(n, 1), torch.ones(1, d), torch.ones(1, 1)
    dx, _ = torch.ops.kore.lora_fa_linear_backward(g, torch.zeros(1, d), A, B, None, 1.0, p, seed_of(seed))
    torch.testing.assert_close(dx, mask(dx, p, seed_of(seed)).float() / (1 - p))


@pytest.mark.parametrize(("dtype", "adapter"), PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 8, 6, 3), (1, 1, 1, 1), (70, 65, 50, 23), (131, 41, 97, 37)])
def test_outputs_and_gradients(backend, shape, dtype, adapter):
    n, d_in, d_out, r = shape
    arguments, g = layer(*shape, dtype, adapter), torch.randn(n, d_out).to(dtype)
    exact_arguments = [t.double() for t in arguments]
    seed = seed_of(11)
    got = run(fused(0.25, seed), *arguments, 0.7, g)
    plain = run(expression(0.25, seed), *arguments, 0.7, g)
    exact = run(expression(0.25, seed), *exact_arguments, 0.7, g)
    for ours, theirs, truth, reduction in zip(got, plain, exact, (d_in + r, d_out + r, n)):
        assert_accurate(ours, theirs, truth, reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout):
    x, *rest = layer(12, 18, 20, 5)
    x, seed, g = laid_out(x, layout), seed_of(2), torch.randn(12, 20)
    g = g.view(*x.shape[:-1], 20)
    for ours, theirs in zip(run(fused(0.5, seed), x, *rest, 1.0, g), run(expression(0.5, seed), x, *rest, 1.0, g)):
        torch.testing.assert_close(ours, theirs)


def test_p_zero_is_the_path_without_dropout(backend):
    arguments, g = layer(70, 33, 50, 23), torch.randn(70, 50)
    without = run(kk.lora_fa_linear, *arguments, 0.7, g)
    for seed in (None, seed_of(4)):
        for ours, theirs in zip(run(fused(0.0, seed), *arguments, 0.7, g), without):
            assert torch.equal(bits(ours), bits(theirs))


def test_repeats_bit_for_bit(backend):
    arguments, g = layer(150, 33, 50, 23, BF16, BF16), torch.randn(150, 50)
    for first, second in zip(*(run(fused(0.1, seed_of(9)), *arguments, 0.5, g) for _ in range(2))):
        assert torch.equal(bits(first), bits(second))


def test_manual_seed_repeats_the_mask_and_calls_differ(backend):
    arguments = layer(30, 33, 20, 7)
    torch.manual_seed(5)
    first, second = (kk.lora_fa_linear(*arguments, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(kk.lora_fa_linear(*arguments, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_mask(backend, reentrant):
    x, weight, bias, A, B = layer(30, 33, 20, 7)
    g = torch.randn(30, 20)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(
            lambda *a: kk.lora_fa_linear(*a, dropout_p=0.5), *arguments, use_reentrant=reentrant
        )

    results = []
    for function in (checkpointed, fused(0.5, None)):
        torch.manual_seed(5)
        results.append(run(function, x, weight, bias, A, B, 0.7, g))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def test_saves_h_and_the_seed(backend):
    x, weight, bias, A, B = layer(12, 18, 20, 5)
    x.requires_grad_()
    B.requires_grad_()
    seed = seed_of(3)
    with Saved() as saved:
        kk.lora_fa_linear(x, weight, bias, A, B, dropout_p=0.5, seed=seed)
    (h,) = saved.activations(weight, A, B, seed)
    assert h.shape == (12, 16)


@pytest.mark.skipif(INTERPRETER, reason="float64")
def test_gradcheck(backend):
    x, weight, bias, A, B = (t.double() for t in layer(4, 9, 6, 3))
    x.requires_grad_()
    B.requires_grad_()
    seed = seed_of(8)
    assert torch.autograd.gradcheck(lambda x, B: fused(0.4, seed)(x, weight, bias, A, B, 0.7), (x, B))
    assert torch.autograd.gradcheck(lambda x, B: reference.forward(x, weight, bias, A, B, 0.7, 0.4, seed)[0], (x, B))


class TestRegistration:
    def test_opcheck(self):
        x, weight, bias, A, B = layer(6, 5, 7, 3)
        arguments = (x.requires_grad_(), weight, bias, A, B.requires_grad_(), 0.5, 0.3, seed_of(1))
        torch.library.opcheck(torch.ops.kore.lora_fa_linear.default, arguments)
        g, h = torch.randn(6, 7), torch.randn(6, 16)
        arguments = (g, weight, A, B.detach(), h, 0.5, 0.3, seed_of(1))
        torch.library.opcheck(torch.ops.kore.lora_fa_linear_backward.default, arguments)

    def test_compiles_into_one_graph(self):
        _, weight, bias, A, B = layer(6, 5, 7, 3)
        B.requires_grad_()
        function = lambda x: fused(0.5, None)(torch.tanh(x), weight, bias, A, B, 0.5).square().sum()  # noqa: E731
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        x, gradients = torch.randn(4, 5), []
        for call in (function, compiled):
            torch.manual_seed(3)
            gradients.append(torch.autograd.grad(call(x.requires_grad_()), (x, B)))
        for theirs, ours in zip(*gradients):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0 and below 1, got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be at least 0 and below 1, got nan"),
        ({"dropout_p": 0.1, "seed": 3}, TypeError, "seed must be a tensor, got int"),
        ({"dropout_p": 0.1, "seed": torch.zeros(1)}, TypeError, "seed must be int64, got float32"),
        ({"dropout_p": 0.1, "seed": torch.tensor(3)}, ValueError, r"seed must have shape \(1,\) \(one number\), got"),
        (
            {"dropout_p": 0.1, "seed": torch.empty(1, dtype=torch.int64, device="meta")},
            ValueError,
            "seed must be on x's device cpu, got meta",
        ),
        ({"dropout_p": 0.1, "merged": True}, ValueError, "merged needs dropout_p = 0, got 0.1"),
    ],
)
def test_bad_input_names_the_argument(options, error, message):
    with pytest.raises(error, match=f"lora_fa_linear: {message}"):
        kk.lora_fa_linear(*layer(6, 5, 7, 3), **options)
