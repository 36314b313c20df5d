"""The LoRA sections of the GPU suite: correctness of both operations, and times of their layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import kore_kernels as kk
from benchmarks.gpu_covariance import BF16, FP16, FP32, one_line
from kore.bench import lora, lora_peers
from kore.bench.check import allowed_error, difference
from kore.bench.lora_layers import Case
from kore.bench.lora_peers import FROZEN, GROUP, MERGED, OURS, PEFT, PEFT_COMPILED
from kore.bench.machine import name_of, settings

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite

RANKS = (1, 7, 16, 100, 235, 274, 512)
KINDS = ("exact", "dropout", "merged", "group")
# A decoder layer of LLaVA-1.5-7B, its layers and how many there are: q, k, v and gate, up together, and all singly.
GROUPED = (((4096, (4096,) * 3), 1), ((4096, (4096,)), 1), ((4096, (11008,) * 2), 1), ((11008, (4096,)), 1))
SINGLE = (((4096, (4096,)), 4), ((4096, (11008,)), 2), ((11008, (4096,)), 1))
EXACT_GOAL, MERGED_GOAL, PEFT_GOAL, RANKS_GOAL = 1.16, 1.08, 1.25, 0.03


@dataclass(frozen=True)
class Check:
    """One call, forward and backward, that is compared with float64."""

    kind: str
    dtype: torch.dtype
    rank: int
    tokens: int
    d_in: int
    d_out: int
    bias: bool = False
    wide: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("bias", "wide") if getattr(self, name)]
        shape = f"({self.tokens}, {self.d_in}→{self.d_out}) r={self.rank}"
        return " ".join([self.kind, name_of(self.dtype), shape, *extras])


def checks(quick: bool) -> list[Check]:
    """What is checked, the telling calls first; ``wide``: float32 factors beside a two-byte x."""
    d_in, d_out, tokens = (1040, 72, 50) if quick else (4096, 4096, 2048)
    found = [Check(kind, dtype, 235, tokens, d_in, d_out) for dtype in (BF16, FP32) for kind in KINDS]
    found += [Check("exact", BF16, rank, tokens, d_in, d_out, bias=True) for rank in RANKS if rank != 235]
    found += [Check(kind, BF16, 274, tokens + 1, 1000, 333, bias=True) for kind in KINDS]
    found += [Check(kind, FP16, 100, 77, 1024, 640) for kind in KINDS]
    found += [Check(kind, BF16, 235, 77, 1000, 129, wide=True) for kind in KINDS]
    found += [Check(kind, FP32, 7, 33, 65, 17, bias=True) for kind in KINDS]
    return found + [Check(kind, BF16, 16, 0, 64, 32) for kind in KINDS]


@dataclass
class Operands:
    """The tensors of a check in its dtype; ``call`` runs its operation on them or on a copy in another dtype."""

    check: Check
    x: Tensor
    gs: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    As: list[Tensor]
    Bs: list[Tensor]
    U: Tensor
    Rs: list[Tensor]
    seed: Tensor = field(repr=False)

    @classmethod
    def random(cls, check: Check, device: torch.device) -> Operands:
        def normal(*shape: int, over: int = 1, dtype: torch.dtype = check.dtype) -> Tensor:
            return (torch.randn(*shape, device=device) / max(over, 1) ** 0.5).to(dtype)

        factor = FP32 if check.wide else check.dtype
        K, N, r, count = check.d_in, check.d_out, check.rank, 2 if check.kind == "group" else 1
        return cls(
            check=check,
            x=normal(check.tokens, K),
            gs=[normal(check.tokens, N) for _ in range(count)],
            weights=[normal(N, K, over=K) for _ in range(count)],
            biases=[normal(N) if check.bias else None for _ in range(count)],
            As=[normal(r, K, over=K, dtype=factor) for _ in range(count)],
            Bs=[normal(N, r, over=r, dtype=factor) for _ in range(count)],
            U=normal(K, r, over=K, dtype=factor),
            Rs=[normal(r, r, over=r, dtype=factor) for _ in range(count)],
            seed=torch.tensor([12345], device=device),
        )

    def call(self, dtype: torch.dtype | None = None, merged: bool | None = None) -> list[Tensor]:
        """Every y, dx, every dB; in ``dtype`` if given, in merged form if the check is of that and unless told."""

        def take(tensor: Tensor) -> Tensor:
            return tensor.detach() if dtype is None else tensor.to(dtype)

        x, Bs = take(self.x).requires_grad_(), [take(B).requires_grad_() for B in self.Bs]
        weights, gs = [take(W) for W in self.weights], [take(g) for g in self.gs]
        biases = [None if bias is None else take(bias) for bias in self.biases]
        if self.check.kind == "group":
            ys = kk.lora_fa_linears(x, weights, biases, take(self.U), [take(R) for R in self.Rs], Bs, 0.7)
        else:
            options: dict[str, Any] = {"dropout_p": 0.3, "seed": self.seed} if self.check.kind == "dropout" else {}
            if self.check.kind == "merged":
                options["merged"] = merged is not False
            ys = [kk.lora_fa_linear(x, weights[0], biases[0], take(self.As[0]), Bs[0], 0.7, **options)]
        torch.autograd.backward(ys, gs)
        gradients = [tensor.grad for tensor in (x, *Bs) if tensor.grad is not None]
        assert len(gradients) == 1 + len(Bs)
        return [*(y.detach() for y in ys), *gradients]


def correctness(suite: Suite) -> dict[str, Any]:
    """Every check by the backend under test and by PyTorch's products: against float64, and twice the same bits."""
    rows: list[dict[str, Any]] = []
    suite.result["lora correctness"] = {"checks": rows}
    planned = checks(suite.quick)
    for index, check in enumerate(planned):
        if suite.left() < 5:
            suite.miss(f"lora: {len(planned) - index} checks")
            break
        torch.manual_seed(index)
        try:
            rows.append(_compare(check, suite))
        except Exception as error:
            suite.fail(f"lora, {check}: {one_line(error)}")
            continue
        for fault in rows[-1]["faults"]:
            suite.fail(f"lora, {check}: {fault}")
    return {"checks": rows}


def _compare(check: Check, suite: Suite) -> dict[str, Any]:
    """Errors of y, dx and dB by backend; the plain expression in the same dtype is the reference backend's."""
    operands = Operands.random(check, suite.device)
    before = [tensor.clone() for tensor in (operands.x, *operands.weights, *operands.Bs)]
    with settings(suite.device, "reference"):
        exact = operands.call(torch.float64, merged=False)
        plain = operands.call(merged=False)
    names = [f"y{i}" for i in range(len(operands.gs))] + ["dx"] + [f"dB{i}" for i in range(len(operands.gs))]
    faults: list[str] = []
    errors: dict[str, dict[str, float]] = {}
    for backend in (suite.backend, "torch"):
        with settings(suite.device, backend):
            found, again = operands.call(), operands.call()
        errors[backend] = {}
        for name, ours, same, theirs, wanted in zip(names, found, again, plain, exact):
            if not torch.equal(ours, same):
                faults.append(f"{backend}, {name}: the same call gave other bits")
            if not wanted.numel():
                continue
            if not wanted.any():
                if ours.any():
                    faults.append(f"{backend}, {name}: not zero")
                continue
            error = errors[backend][name] = difference(ours, wanted)
            allowed = allowed_error(difference(theirs, wanted), max(check.tokens, check.d_in, check.d_out))
            if check.kind == "merged" and not name.startswith("dB"):
                allowed += torch.finfo(check.dtype).eps  # of rounding W + sBA
            if not error <= allowed:
                faults.append(f"{backend}, {name}: relative error {error:.2e}, allowed are {allowed:.2e}")
    if not all(torch.equal(a, b) for a, b in zip(before, (operands.x, *operands.weights, *operands.Bs))):
        faults.append("an argument was changed")
    return {"check": str(check), "errors": errors, "faults": faults}


def cases(quick: bool) -> list[tuple[Case, bool]]:
    """What is timed and whether a compiled PEFT is, in the order of what the goals are about."""
    shapes = list(dict.fromkeys(shape for shape, _ in (*SINGLE, *GROUPED)))
    single = [shape for shape, _ in SINGLE]
    if quick:
        tiny = [Case(64, (48,), 32, 12, BF16), Case(64, (48,) * 2, 32, 12, BF16)]
        return [(case, False) for case in tiny]
    first = [Case(*shape, 8192, 256, BF16) for shape in shapes]
    pairs = [(8192, rank) for rank in (235, 240, 128, 64, 274)]
    pairs += itertools.product((4096, 16384), (256, 235, 240, 128, 64, 274))
    others = [Case(*shape, tokens, rank, BF16) for tokens, rank in pairs for shape in single]
    head, tail = first + others[: 2 * len(single)], others[2 * len(single) :]
    compiled = [(case, True) for case in first[: len(single)]]
    return [*((case, False) for case in head), *compiled, *((case, False) for case in tail)]


def times(suite: Suite) -> dict[str, Any]:
    """Layers of LLaVA-1.5-7B beside their peers."""
    rows: list[dict[str, Any]] = []
    planned, rounds = cases(suite.quick), 3 if suite.quick else 9
    stored: dict[str, Any] = {"cases": rows, "left_out": {}}
    suite.result["lora"] = stored
    with settings(suite.device, suite.backend):
        for index, (case, compiled) in enumerate(planned):
            if suite.left() < (25 if compiled else 8):
                suite.miss(f"lora times: {len(planned) - index} cases")
                break
            running, stored["left_out"] = lora_peers.select(case, suite.device)
            wanted = {FROZEN, OURS, PEFT, PEFT_COMPILED} if compiled else {p.name for p in running} - {PEFT_COMPILED}
            timed = [peer for peer in running if peer.name in wanted]
            try:
                rows.append(lora.measure(case, suite.clock, timed, rounds, seconds=2.0))
            except Exception as error:
                suite.fail(f"lora {case.shape} N={case.tokens} r={case.rank}: {one_line(error)}")
                continue
            print(_line(rows[-1]), flush=True)
            suite.save()
    return {**stored, "goals": goals(rows)}


def _line(row: dict[str, Any]) -> str:
    ratios = [
        f"{name} {each['over_frozen']['median']:.3f}" for name, each in row["contenders"].items() if name != FROZEN
    ]
    where = f"{row['shape']} N={row['tokens']} r={row['rank']}"
    return f"{where:30} floor {row['contenders'][OURS]['floor']:.3f}  {', '.join(ratios)}"


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was found for each goal, beside it; None where a case was not timed."""
    layer = {"tokens": 8192, "rank": 256}

    def time_of(name: str, weights: Any, **where: int) -> float | None:
        """Milliseconds of a decoder layer by one contender; of single layers by ``OURS`` where a group is wanted."""
        total = 0.0
        for (d_in, d_out), count in weights:
            at = {"d_in": d_in, "d_out": list(d_out), **where}
            found = next((row for row in rows if all(row[key] == value for key, value in at.items())), None)
            which = OURS if name == GROUP and len(d_out) == 1 else name
            if found is None or which not in found["contenders"]:
                return None
            total += count * found["contenders"][which]["both"]["median_ms"]
        return total

    def over(name: str, other: str, weights: Any) -> float | None:
        mine, theirs = time_of(name, weights, **layer), time_of(other, weights, **layer)
        return None if mine is None or theirs is None else mine / theirs

    apart = []
    for shape, _ in SINGLE:
        odd, even = (time_of(OURS, [(shape, 1)], tokens=8192, rank=rank) for rank in (235, 240))
        if odd is not None and even is not None:
            apart.append(abs(odd / even - 1))
    return {
        "LLaVA-7B layer, r=256, 8192 tokens, exact, in groups, over frozen": {
            "goal": EXACT_GOAL,
            "found": over(GROUP, FROZEN, GROUPED),
        },
        "the same singly": {"goal": EXACT_GOAL, "found": over(OURS, FROZEN, SINGLE)},
        "the same merged": {"goal": MERGED_GOAL, "found": over(MERGED, FROZEN, SINGLE)},
        "the same, PEFT over ours": {"goal": PEFT_GOAL, "found": over(PEFT, GROUP, GROUPED)},
        "ranks 235 and 240 apart, 8192 tokens, most": {"goal": RANKS_GOAL, "found": max(apart, default=None)},
    }
