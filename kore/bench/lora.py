"""Linear layers with a frozen-A update beside their peers: checked against float64, timed in turn, set beside flops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kore.bench.check import PEER_TOLERANCE, allowed_error, check, difference
from kore.bench.lora_layers import Case, Layers
from kore.bench.lora_peers import FROZEN, GROUP, OURS, PEFT, Built, Peer, select
from kore.bench.machine import made_with, name_of
from kore.bench.memory import peak_bytes, saved_bytes
from kore.bench.timing import Clock, in_turn, ratio, summary

_NEEDED = (FROZEN, OURS, PEFT)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shapes: d_in and the d_out of every layer that reads it.
        tokens, ranks, dtypes: Of the cases; a rank that is above a shape's d_in is left out there.
        rounds: Times each contender runs in a case.
        seconds: A case begins no further round after that, once it has three.
    """

    shapes: Sequence[tuple[int, tuple[int, ...]]]
    tokens: Sequence[int]
    ranks: Sequence[int]
    dtypes: Sequence[torch.dtype]
    rounds: int = 9
    seconds: float = 20.0

    def cases(self) -> list[Case]:
        return [
            Case(d_in, d_out, n, r, dtype)
            for dtype in self.dtypes
            for d_in, d_out in self.shapes
            for n in self.tokens
            for r in self.ranks
            if r <= d_in
        ]


class Contender:
    """One peer on the layers of a case: a forward and a backward pass, and what they are to give."""

    def __init__(self, built: Built, layers: Layers) -> None:
        self.built, self._gs = built, layers.gs
        self._x = layers.x.detach().requires_grad_()
        self._ys: Sequence[Tensor] = ()

    def clear(self) -> None:
        """Drop outputs and gradients."""
        self._ys = ()
        for tensor in (self._x, *self.built.Bs, *self.built.others):
            tensor.grad = None

    def forward(self) -> Sequence[Tensor]:
        self._ys = self.built.forward(self._x)
        return self._ys

    def backward(self) -> None:
        torch.autograd.backward(self._ys, self._gs)

    def step(self) -> None:
        """Both passes, from a clean start."""
        self.clear()
        self.forward()
        self.backward()

    def errors(self, layers: Layers, exact: Sequence[Tensor]) -> dict[str, float]:
        """The largest relative error of y, dx and, where it trains, dB."""
        self.step()
        gradients = [tensor.grad for tensor in (self._x, *self.built.Bs)]
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("no gradient of x or of a B")
        found = [*(y.detach() for y in self._ys), *(g for g in gradients if g is not None)]
        layer_count = len(self._ys)
        each = [difference(one, other) for one, other in zip(found, exact)]
        self.clear()
        parts = {"y": each[:layer_count], "dx": each[layer_count : layer_count + 1], "dB": each[layer_count + 1 :]}
        return {name: max(values) for name, values in parts.items() if values}


def run(plan: Plan, device: torch.device, say: Callable[[dict[str, Any]], None] = lambda case: None) -> dict[str, Any]:
    """Measure every case of the plan; ``say`` hears of each when it is done.

    Returns:
        A dictionary for JSON: environment, machine, cases, and why a peer was left out.

    Raises:
        InaccurateError: A contender failed its check; nothing of that case was timed.
    """
    clock = Clock(device)
    cases: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for case in plan.cases():
        peers, reasons = select(case, device)
        left_out.update(reasons)
        cases.append(measure(case, clock, peers, plan.rounds, plan.seconds))
        say(cases[-1])
    return {**made_with("lora_fa_linear", device), "cases": cases, "left_out": left_out}


def measure(
    case: Case, clock: Clock, peers: Iterable[Peer], rounds: int, seconds: float = float("inf")
) -> dict[str, Any]:
    """Forward and backward of one case by every peer in turn; the frozen layers, ours and PEFT are among them.

    A peer that cannot run (a library refuses) is reported with its error instead of times.
    """
    layers = Layers.random(case, clock.device)
    contenders, errors, refused = _checked(case, layers, peers)
    memory = {name: _memory(contender, layers) for name, contender in contenders.items()}
    launch_bound: dict[int, bool] = {}

    def timed(contender: Contender) -> list[float]:
        contender.clear()
        laps = clock.laps(contender.forward, contender.backward)
        launch_bound[id(contender)] = clock.launch_bound
        contender.clear()
        return laps

    times = in_turn(contenders, timed, rounds, seconds=seconds)
    both = {name: [forward + backward for forward, backward in laps] for name, laps in times.items()}
    rows = {
        name: {
            "forward": summary([forward for forward, _ in laps]),
            "backward": summary([backward for _, backward in laps]),
            "both": summary(both[name]),
            "over_frozen": ratio(both[name], both[FROZEN]),
            "ours_is_faster": ratio(both[name], both[OURS]),
            "relative_error": errors[name],
            **memory[name],
            "launch_bound": launch_bound[id(contenders[name])],
        }
        for name, laps in times.items()
    }
    return {
        "shape": case.shape,
        "d_in": case.d_in,
        "d_out": list(case.d_out),
        "tokens": case.tokens,
        "rank": case.rank,
        "dtype": name_of(case.dtype),
        "rounds": len(both[OURS]),
        "contenders": {name: {**row, **_gap(case, name, rows)} for name, row in rows.items()},
        "refused": refused,
    }


def _checked(
    case: Case, layers: Layers, peers: Iterable[Peer]
) -> tuple[dict[str, Contender], dict[str, dict[str, float]], dict[str, str]]:
    """The contenders that passed, their errors, and the refusals. Exact ones of ours must be as good as PEFT."""
    contenders: dict[str, Contender] = {}
    errors: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    frozen, exact = layers.exact()
    for peer in peers:
        try:
            contender = Contender(peer.build(layers), layers)
            errors[peer.name] = contender.errors(layers, frozen if peer.name == FROZEN else exact)
            contenders[peer.name] = contender
        except Exception as refusal:
            if peer.name in _NEEDED:
                raise
            refused[peer.name] = f"{type(refusal).__name__}: {refusal}".splitlines()[0]
    longest = max(case.tokens, case.d_in, *case.d_out)
    where = f"{case.shape}, N={case.tokens}, r={case.rank}, {name_of(case.dtype)}"
    for name, found in errors.items():
        for part, error in found.items():
            ours = name in (OURS, GROUP)
            limit = allowed_error(errors[PEFT][part], longest) if ours else PEER_TOLERANCE
            check(f"{name}, {part}", where, error, limit)
    return contenders, errors, refused


def _memory(contender: Contender, layers: Layers) -> dict[str, int | None]:
    found = {
        "saved_bytes": saved_bytes(lambda: contender.built.forward(layers.x.clone().requires_grad_())),
        "peak_bytes": peak_bytes(contender.step, layers.x.device),
    }
    contender.clear()
    return found


def _gap(case: Case, name: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The flop floor, and of the time that PEFT takes above it the share that is left; None where PEFT takes none."""
    if name == FROZEN:
        return {"floor": 1.0, "gap_left": None}
    floor = case.floor(shared=name == GROUP)
    peft = rows[PEFT]["over_frozen"]["median"] - floor
    return {"floor": floor, "gap_left": (rows[name]["over_frozen"]["median"] - floor) / peft if peft > 0 else None}
