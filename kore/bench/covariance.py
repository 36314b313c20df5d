"""One covariance update beside its peers: checked against float64, timed in turn, set against the roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kore.bench.check import PEER_TOLERANCE, allowed_error, check
from kore.bench.machine import DTYPES, Roofline, made_with, measure_roofline, name_of
from kore.bench.peers import ADDMM, OURS, Peer, select
from kore.bench.timing import Clock, Step, in_turn, ratio, summary

_COLUMNS = 256


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        dims: Values of d.
        tokens: Values of N.
        dtypes: Of x; C is float32.
        rounds: Times each contender runs in a case.
        seconds: A case begins no further round after that, once it has three.
        quick: Small products for the roofline.
    """

    dims: Sequence[int]
    tokens: Sequence[int]
    dtypes: Sequence[torch.dtype]
    rounds: int = 9
    seconds: float = 20.0
    quick: bool = False


def run(plan: Plan, device: torch.device, say: Callable[[dict[str, Any]], None] = lambda case: None) -> dict[str, Any]:
    """Measure the machine, every case of the plan, and the machine again; ``say`` hears of each case when it is done.

    Returns:
        A dictionary for JSON: environment, machine, roofline, cases, and why a peer was left out.

    Raises:
        InaccurateError: A contender failed its check; nothing of that case was timed.
    """
    clock = Clock(device)
    roofline = measure_roofline(clock, plan.dtypes, plan.quick)
    cases: list[dict[str, Any]] = []
    left_out = {}
    for dtype in plan.dtypes:
        peers, reasons = select(device, dtype)
        left_out[name_of(dtype)] = reasons
        for d in plan.dims:
            for n in plan.tokens:
                cases.append(measure(d, n, dtype, clock, peers, plan.rounds, plan.seconds))
                say(cases[-1])
    roofline = roofline.best(measure_roofline(clock, plan.dtypes, plan.quick))
    return {
        **made_with("covariance_update", device),
        "roofline": roofline.as_dict(),
        "cases": [against(case, roofline) for case in cases],
        "left_out": left_out,
    }


def measure(
    d: int,
    n: int,
    dtype: torch.dtype,
    clock: Clock,
    peers: Sequence[Peer],
    rounds: int,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """One update of C (d, d) float32 with a random x (n, d), by every peer in turn; the first two are ours, addmm_.

    A peer that cannot run (a library refuses) is reported with its error instead of times.
    """
    torch.manual_seed(0)
    x = torch.randn(n, d, device=clock.device).to(dtype)
    C = torch.zeros(d, d, device=clock.device)
    steps, errors, refused = _checked(C, x, peers)
    C.zero_()
    launch_bound: dict[str, bool] = {}

    def timed(step: Step) -> float:
        spent = clock.milliseconds(step)
        launch_bound[names[id(step)]] = clock.launch_bound
        return spent

    names = {id(step): name for name, step in steps.items()}
    times = in_turn(steps, timed, rounds, seconds=seconds)
    return {
        "d": d,
        "n": n,
        "dtype": name_of(dtype),
        "rounds": len(times[OURS]),
        "contenders": {
            name: {
                **summary(values),
                "ours_is_faster": ratio(values, times[OURS]),
                "relative_error": errors[name],
                "launch_bound": launch_bound[name],
            }
            for name, values in times.items()
        },
        "refused": refused,
    }


def against(case: Mapping[str, Any], roofline: Roofline) -> dict[str, Any]:
    """A case with its floor, what sets that, and every contender's share of the roofline."""
    seconds, bound = roofline.floor(case["d"], case["n"], DTYPES[case["dtype"]])
    contenders = {
        name: {**values, "of_roofline": 1e3 * seconds / values["median_ms"]}
        for name, values in case["contenders"].items()
    }
    return {**case, "floor_ms": 1e3 * seconds, "bound": bound, "contenders": contenders}


def _checked(C: Tensor, x: Tensor, peers: Sequence[Peer]) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """The steps of the peers that passed, all their errors, and the refusals. Ours must be as good as ``addmm_``'s."""
    steps: dict[str, Step] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for peer in peers:
        try:
            steps[peer.name] = peer.prepare(C, x)
            errors[peer.name] = relative_error(C, x, peer, steps[peer.name])
        except Exception as refusal:
            if peer.name in (OURS, ADDMM):
                raise
            steps.pop(peer.name, None)
            refused[peer.name] = f"{type(refusal).__name__}: {refusal}".splitlines()[0]
    where = f"d={C.shape[0]}, N={x.shape[0]}, {name_of(x.dtype)}"
    limit = allowed_error(errors[ADDMM], x.shape[0])
    for name, error in errors.items():
        check(name, where, error, limit if name == OURS else PEER_TOLERANCE)
    return steps, errors, refused


def relative_error(C: Tensor, x: Tensor, peer: Peer, step: Step) -> float:
    """‖C − exact‖ / ‖exact‖ of one call that starts from a C of about the same size, over the lower triangle.

    At most 256 columns of C are looked at, one drawn from each of 256 equal ranges, so that no tile goes unseen.
    """
    d = C.shape[0]
    edges = torch.linspace(0, d, min(d, _COLUMNS) + 1).long()
    columns = (edges[:-1] + (torch.rand(len(edges) - 1) * edges.diff()).long()).to(C.device)
    rows = peer.terms(x)
    exact = peer.factor * (rows.T @ rows[:, columns])
    start = exact.abs().mean().to(C.dtype)
    C.copy_(start)
    step()
    lower = torch.arange(d, device=C.device)[:, None] >= columns
    difference = torch.where(lower, C[:, columns].double() - start - exact, 0.0)
    return float(difference.norm() / torch.where(lower, exact, 0.0).norm())
