"""What keeps routed experts apart: equal load, and outputs that tell one expert from another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kore.adapter.routed import RoutedLinear, routed_layers
from kore.errors import ConfigError
from kore.penalty import Forward, Penalty, Start
from kore.protection.adapted import AdaptedLayer


def balance(probabilities: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """N Σ_i f_i P_i of each sequence: f_i the share of what is chosen that goes to expert i, P_i its mean probability.

    It is 1 where all have the same load, N where one has all. f has no gradient.

    Args:
        probabilities: (batch, tokens, N).
        chosen: (batch, tokens, N), True where the token goes to the expert.
        real: (batch, tokens), False for padding.

    Returns:
        (batch,).
    """
    weights = real.to(probabilities.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    shares = chosen.to(probabilities.dtype) / chosen.sum(-1, keepdim=True)
    f, P = ((weights[..., None] * each).sum(1) for each in (shares, probabilities))
    return probabilities.shape[-1] * (f * P).sum(-1)


def contrast(outputs: torch.Tensor, expert: torch.Tensor, there: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over pairs (q, k₊) of −log [exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ_{k₋} exp(q·k₋/τ))], for each sequence.

    q and k₊ are outputs of the same expert for two tokens, k₋ those of others. An output longer than 1 counts with
    length 1, so that making outputs longer is no way to tell them apart. Where all are alike it is log(1 + #k₋).

    Args:
        outputs: (batch, m, d).
        expert: (batch, m), whose output it is.
        there: (batch, m), False for those that do not count.
        temperature: τ.

    Returns:
        (batch,), 0 where there is no pair.
    """
    u = outputs / outputs.norm(dim=-1, keepdim=True).clamp(min=1)
    scores = u @ u.transpose(1, 2) / temperature
    pairs = there[:, :, None] & there[:, None, :]
    alike = expert[:, :, None] == expert[:, None, :]
    different = pairs & ~alike
    positive = pairs & alike & ~torch.eye(expert.shape[1], dtype=torch.bool, device=u.device)
    others = scores.masked_fill(~different, torch.finfo(scores.dtype).min / 2).logsumexp(-1, keepdim=True)
    losses = torch.nn.functional.softplus(others - scores) * positive
    return losses.sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)


def spread(real: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to ``count`` evenly spaced real tokens of each sequence: their places (batch, count), and which there are."""
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    length = real.sum(1, keepdim=True)
    number = torch.arange(count, device=real.device)[None]
    index = torch.where(length >= count, number * length // count, number.clamp(max=real.shape[1] - 1))
    return order.gather(1, index), (number < length)


@dataclass(frozen=True)
class Record:
    """What a layer did in a forward pass."""

    layer: RoutedLinear
    adapter: str
    probabilities: torch.Tensor
    gates: torch.Tensor
    inner: torch.Tensor


class Guidance(Penalty):
    """α · balance + β · contrast, means over the layers and over the sequences by their labelled tokens.

    Both are of single sequences, so it does not matter how a step is split. In layers with all experts the most
    probable one counts as chosen for the balance.

    Attributes:
        weights: α and β.
        temperature: τ of the contrast.
        tokens: How many tokens of a sequence are contrasted.
    """

    def __init__(self, balance: float, contrastive: float, temperature: float, tokens: int) -> None:
        self.weights = balance, contrastive
        self.temperature, self.tokens = temperature, tokens
        self._records: list[Record] = []
        self._open = False
        self._layers: list[RoutedLinear] = []
        self._hooks: list[Any] = []
        self._last: dict[str, float | torch.Tensor] = {}

    def identity(self) -> dict[str, Any]:
        values = {"weights": list(self.weights), "temperature": self.temperature, "tokens": self.tokens}
        return {"guidance": values}

    def begin(self, start: Start) -> None:
        """Raises ConfigError where the model has no routed experts."""
        self._layers = list(routed_layers(start.model).values())
        if not self._layers:
            raise ConfigError("the contrast of experts needs a model with routed experts, method moelora")
        for layer in self._layers:
            layer.recorder = self._record
        # Recorded is the forward pass itself, not what gradient checkpointing does again later.
        self._hooks = [
            start.model.register_forward_pre_hook(lambda model, inputs: self._begin_forward(model.training)),
            start.model.register_forward_hook(lambda model, inputs, outputs: self._begin_forward(False, keep=True)),
        ]

    def _begin_forward(self, open: bool, keep: bool = False) -> None:
        self._open = open
        if not keep:
            self._records = []

    def _record(self, *what: Any) -> None:
        if self._open:
            self._records.append(Record(*what))

    def batch(self, forward: Forward) -> torch.Tensor | None:
        records, self._records = self._records, []
        tokens = forward.labelled.sum(1)
        mask = forward.inputs.get("attention_mask")
        sums = [torch.zeros((), device=tokens.device)] * 2
        for record in records:
            p = record.probabilities
            if p.dim() != 3 or (mask is not None and p.shape[:2] != mask.shape):
                raise ConfigError("the contrast of experts needs adapted layers that see whole sequences")
            real = torch.ones(p.shape[:2], dtype=torch.bool, device=p.device) if mask is None else mask.bool()
            with torch.autocast(p.device.type, enabled=False):
                parts = (self._balance(record, real.to(p.device)), self._contrast(record, real.to(p.device)))
                share = (tokens.to(p.device) / forward.count).to(p.dtype)
                sums = [total + (share * part).sum().to(total.device) for total, part in zip(sums, parts)]
        means = [total / max(len(records), 1) for total in sums]
        self._last = {name: mean.detach() for name, mean in zip(("balance", "contrast"), means)}
        return self.weights[0] * means[0] + self.weights[1] * means[1]

    def _balance(self, record: Record, real: torch.Tensor) -> torch.Tensor:
        p = record.probabilities
        if record.layer.top[record.adapter] is None:
            chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.argmax(-1, keepdim=True), True)
        else:
            chosen = record.gates > 0
        return balance(p, chosen, real)

    def _contrast(self, record: Record, real: torch.Tensor) -> torch.Tensor:
        """Of B_i A_i x of the experts that a token goes to, and of no other."""
        if self.weights[1] == 0:
            return torch.zeros(len(real), device=real.device)
        ranks = torch.tensor(record.layer.ranks[record.adapter], device=real.device)
        places, there = spread(real, self.tokens)
        dtype = record.probabilities.dtype
        inner, gates = (
            tensor.gather(1, places[..., None].expand(-1, -1, tensor.shape[-1]))
            for tensor in (record.inner, record.gates)
        )
        expert = gates.topk(record.layer.top[record.adapter] or len(ranks), dim=-1).indices
        block = torch.arange(len(ranks), device=real.device).repeat_interleave(ranks)
        own = inner.to(dtype)[..., None, :] * (expert[..., None] == block)
        outputs = own.flatten(1, 2) @ AdaptedLayer(record.layer, record.adapter).B.to(dtype).T
        routed = there[..., None].expand_as(expert).flatten(1)
        return contrast(outputs, expert.flatten(1), routed, self.temperature)

    def finish(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.recorder = None
        self._hooks, self._layers, self._records = [], [], []

    def log(self) -> dict[str, float]:
        """Both without their weights, as this process saw them in its last forward pass."""
        found = {name: float(value) for name, value in self._last.items()}
        return {f"expert_{name}": value for name, value in found.items() if math.isfinite(value)}
