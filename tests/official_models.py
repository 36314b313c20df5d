"""Models as the official code builds them: every linear layer of the language model split into W_res, A and B."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kore.models import language_model_linears, projector_name
from tests.batches import make_batch

RANK = 5


class RemoteLinear(nn.Module):
    """Shaped as the official layer, from remote code as it were: nothing of it is imported from KORE."""

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.BLinear = nn.Linear(in_features, rank, bias=False)
        self.ALinear = nn.Linear(rank, out_features, bias=bias)
        self.weight_residual = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)

    def forward(self, input):
        return self.ALinear(self.BLinear(input)) + F.linear(input, self.weight_residual)


def split(linear, basis, cls=RemoteLinear):
    """W0 = W_res + B₀A by the paper's formula, computed in float32 and stored in the dtype of ``linear``."""
    rank = basis.shape[1]
    weight = linear.weight.detach().float()
    u, s, vt = torch.linalg.svd(weight @ basis @ basis.mT, full_matrices=False)
    new = cls(linear.in_features, linear.out_features, rank, linear.bias is not None)
    new.BLinear.weight.data = (s[:rank, None].sqrt() * vt[:rank]).contiguous()
    new.ALinear.weight.data = (u[:, :rank] * s[:rank].sqrt()).contiguous()
    new.weight_residual.data = weight - weight @ basis @ basis.mT
    if linear.bias is not None:
        new.ALinear.bias.data = linear.bias.detach().clone()
    return new.to(linear.weight.dtype)


def officialise(model, cls=RemoteLinear, rank=RANK):
    """``model`` with its language model's linear layers split, in place, and all but ALinear.weight frozen."""
    generator = torch.Generator().manual_seed(7)
    for name in language_model_linears(model):
        linear = model.get_submodule(name)
        basis = torch.linalg.qr(torch.randn(linear.in_features, rank, generator=generator)).Q
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, split(linear, basis, cls))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("ALinear.weight")
    return model


def train(model, kind, steps=3, factor="ALinear"):
    """A few steps on ``factor`` and the projector, as the official scripts take."""
    projector = projector_name(model)
    trained = []
    for name, parameter in model.named_parameters():
        in_projector = projector is not None and name.startswith(f"{projector}.")
        parameter.requires_grad = in_projector or name.endswith(f"{factor}.weight")
        trained += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0)
    batch = make_batch(kind)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**{**batch, "labels": batch["input_ids"]}).loss.backward()
        optimizer.step()
    return model.eval()
