"""The covariance sections of the GPU suite: measured roofline, correctness of every backend, times of one update."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import kore_kernels as kk
from kore.bench import covariance, peers
from kore.bench.check import allowed_error
from kore.bench.machine import measure_roofline, name_of, settings

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FULL_PRODUCTS = ("addmm to float32", "mm to float32, add")


def roofline(suite: Suite) -> dict[str, Any]:
    """Rates of the device; every later fraction is of these."""
    suite.roofline = measure_roofline(suite.clock, (BF16, FP32), quick=suite.quick)
    print(suite.roofline.as_dict(), flush=True)
    return suite.roofline.as_dict()


@dataclass(frozen=True)
class Check:
    """One call of covariance_update_ that is compared with float64."""

    d: int
    n: int
    dtype: torch.dtype
    mask: bool = False
    weight: bool = False
    alpha: str = "number"
    layout: str = "rows"
    triangle: Literal["lower", "upper"] = "lower"

    def __str__(self) -> str:
        extras = [name for name in ("mask", "weight") if getattr(self, name)]
        extras += [
            value for value in (self.alpha, self.layout, self.triangle) if value not in ("number", "rows", "lower")
        ]
        return f"{name_of(self.dtype)} x ({self.n}, {self.d}){''.join(f' {extra}' for extra in extras)}"


def checks(quick: bool) -> list[Check]:
    """The calls that are checked, the telling ones first; each makes the Triton backend compile one kernel or two."""
    wide, middle, long = (96, 50, 300) if quick else (4096, 1000, 20_000)
    found = [Check(wide, 600, dtype) for dtype in (BF16, FP32, FP16)]
    found += [Check(235, long, dtype) for dtype in (BF16, FP32)]
    for dtype in (BF16, FP32):
        found += [
            Check(middle, 2049, dtype, mask=True),
            Check(middle, 2049, dtype, mask=True, weight=True, alpha="tensor"),
            Check(wide, 600, dtype, triangle="upper"),
            Check(middle, 2049, dtype, weight=True, triangle="upper"),
            Check(middle, 333, dtype, layout="strided"),
            Check(middle, 333, dtype, layout="transposed"),
            Check(17, 15, dtype),
            Check(1, 16, dtype),
            Check(middle, 1, dtype),
            Check(128, 0, dtype),
        ]
    found += [Check(middle, 2049, FP16, mask=True, weight=True), Check(wide, 333, BF16, layout="expanded")]
    return found


def correctness(suite: Suite) -> dict[str, Any]:
    """Every check by every backend that can run on the device; what does not fit into the time is wrong too."""
    stored: dict[str, Any] = {}
    for backend in (suite.backend, "torch", "reference"):
        rows: list[dict[str, Any]] = []
        stored[backend] = rows
        with settings(suite.device, backend):
            for index, check in enumerate(checks(suite.quick)):
                if suite.left() < 5:
                    suite.miss(f"{backend}: {len(checks(suite.quick)) - index} checks")
                    break
                torch.manual_seed(index)
                try:
                    rows.append(_compare(check, suite.device))
                except Exception as error:
                    suite.fail(f"{backend}, {check}: {one_line(error)}")
                    continue
                for fault in rows[-1]["faults"]:
                    suite.fail(f"{backend}, {check}: {fault}")
            for fault in (*_propagation(suite.device), *_symmetry(suite.device)):
                suite.fail(f"{backend}: {fault}")
        worst = max((row["error"] / row["allowed"] for row in rows), default=0.0)
        print(f"{backend}: {len(rows)} checks, error at most {worst:.2f} of what is allowed", flush=True)
    return stored


def _compare(check: Check, device: torch.device) -> dict[str, Any]:
    """One call against float64, starting from a random C whose other triangle is NaN; the call is made twice."""
    d = check.d
    x, mask, weight = _inputs(check, device)
    alpha: float | Tensor = torch.tensor(0.5, device=device) if check.alpha == "tensor" else 0.5
    lower = torch.ones(d, d, dtype=torch.bool, device=device).tril()
    written = lower if check.triangle == "lower" else lower.T.contiguous()
    start = torch.where(written, torch.randn(d, d, device=device), torch.nan)
    rows = torch.where(mask[:, None], x, 0.0) if mask is not None else x
    weighted = rows.double() if weight is None else rows.double() * weight.double()[:, None]
    exact = torch.where(written, start.double() + 0.5 * (weighted.T @ rows.double()), 0.0)
    plain = torch.addmm(torch.where(written, start, 0.0), weighted.float().T, rows.float(), alpha=0.5)
    before, results = x.clone(), []
    for _ in range(2):
        C = start.clone()
        kk.covariance_update_(C, x, mask=mask, weight=weight, alpha=alpha, triangle=check.triangle)
        results.append(C)
    C, again = results
    size = exact.norm()
    error, plain_error = (
        float(torch.where(written, found.double() - exact, 0.0).norm() / size) for found in (C, plain)
    )
    allowed = allowed_error(plain_error, check.n)
    faults = []
    if not error <= allowed:
        faults.append(f"relative error {error:.2e}, allowed are {allowed:.2e}")
    if not bool(C[~written].isnan().all()):
        faults.append("the other triangle was written")
    if not torch.equal(C.view(torch.int32), again.view(torch.int32)):
        faults.append("the same call gave other bits")
    if not torch.equal(before.nan_to_num(0.0), x.nan_to_num(0.0)):
        faults.append("x was changed")
    fields = {**asdict(check), "dtype": name_of(check.dtype)}
    return {**fields, "error": error, "allowed": allowed, "faults": faults}


def _inputs(check: Check, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x in its layout, the mask of kept rows, the weights. Rows that the mask leaves out hold NaN and infinity."""
    n, d = check.n, check.d
    x = torch.randn(n, d, device=device).to(check.dtype)
    if check.layout == "strided":
        x = torch.randn(n, 2 * d + 3, device=device).to(check.dtype)[:, 3 : d + 3]
    elif check.layout == "transposed":
        x = x.T.contiguous().T
    elif check.layout == "expanded":
        x = x[:1].expand(n, d)
    mask = weight = None
    if check.mask:
        mask = torch.rand(n, device=device) < 0.7
        x[~mask] = torch.nan
        x[~mask, 0] = torch.inf
    if check.weight:
        weight = torch.randn(n, device=device)
    return x, mask, weight


def _propagation(device: torch.device) -> list[str]:
    """A NaN or an infinity in x reaches its row and column of C, and nothing else."""
    faults = []
    for dtype in (BF16, FP32):
        for value in (torch.nan, torch.inf):
            x = torch.randn(100, 64, device=device).to(dtype)
            x[7, 20] = value
            C = torch.zeros(64, 64, device=device)
            kk.covariance_update_(C, x)
            finite = C.isfinite() | torch.ones_like(C, dtype=torch.bool).triu(1)
            expected = torch.ones_like(finite)
            expected[20, :21] = expected[20:, 20] = False
            if not torch.equal(finite, expected):
                faults.append(f"{value} in {name_of(dtype)} x did not reach exactly its row and column of C")
    return faults


def _symmetry(device: torch.device) -> list[str]:
    faults = []
    C = torch.randn(333, 333, device=device)
    if not torch.equal(kk.symmetrize_(C.clone()), C.tril() + C.tril(-1).T):
        faults.append("symmetrize_ does not mirror the lower triangle")
    if not torch.equal(kk.symmetrize_(C.clone(), triangle="upper"), C.triu() + C.triu(1).T):
        faults.append("symmetrize_ does not mirror the upper triangle")
    return faults


def cases(quick: bool) -> list[tuple[torch.dtype, int, int]]:
    """(dtype, d, N) in the order in which they are timed: what the goals are about comes first."""
    dims = (64, 96) if quick else (4096, 11008, 1024, 5120, 13824, 18944)
    tokens = (16, 64) if quick else (2048, 600, 8192)
    return [(dtype, d, n) for dtype in (BF16, FP32) for d in dims for n in tokens]


def times(suite: Suite) -> dict[str, Any]:
    """One update beside torch's full products, as a fraction of the roofline."""
    if suite.roofline is None:
        suite.result["roofline"] = roofline(suite)
    assert suite.roofline is not None
    rows: list[dict[str, Any]] = []
    planned, rounds = cases(suite.quick), 3 if suite.quick else 9
    stored: dict[str, Any] = {"cases": rows, "extra_bytes": {}, "left_out": {}}
    suite.result["covariance"] = stored
    with settings(suite.device, suite.backend):
        for index, (dtype, d, n) in enumerate(planned):
            if suite.left() < 8:
                suite.miss(f"times: {len(planned) - index} cases")
                break
            running, stored["left_out"][name_of(dtype)] = peers.select(suite.device, dtype)
            timed = [peer for peer in running if not peer.scaled]
            try:
                case = covariance.measure(d, n, dtype, suite.clock, timed, rounds, seconds=2.5)
            except Exception as error:
                suite.fail(f"{name_of(dtype)} d={d} N={n}: {one_line(error)}")
                continue
            rows.append(covariance.against(case, suite.roofline))
            print(_line(rows[-1]), flush=True)
            suite.save()
        if suite.device.type == "cuda":
            stored["extra_bytes"] = {name_of(dtype): _extra_bytes(suite.device, dtype) for dtype in (BF16, FP32)}
    return {**stored, "goals": _goals(rows)}


def full_product(case: dict[str, Any]) -> float | None:
    """How many times as long as ours torch's fastest two-byte product with a float32 sum takes; None without one."""
    ratios = [
        case["contenders"][name]["ours_is_faster"]["median"] for name in FULL_PRODUCTS if name in case["contenders"]
    ]
    return min(ratios, default=None)


def _goals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The least value among the cases that a goal is about, beside the goal; None where no case was timed."""
    halves = [row for row in rows if row["dtype"] == "bfloat16" and row["d"] >= 4096]
    large, small = [row for row in halves if row["n"] >= 2048], [row for row in halves if row["n"] == 600]
    share = [row["contenders"][peers.OURS]["of_roofline"] for row in large]
    traffic = [row["contenders"][peers.OURS]["of_roofline"] for row in small]
    products = [ratio for row in large if (ratio := full_product(row)) is not None]
    return {
        "bfloat16 d >= 4096, N >= 2048, of the roofline": {"goal": 0.85, "least": min(share, default=None)},
        "bfloat16 d >= 4096, N = 600, of the roofline": {"goal": 0.80, "least": min(traffic, default=None)},
        "bfloat16 d >= 4096, N >= 2048, full product / ours": {"goal": 1.7, "least": min(products, default=None)},
    }


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _extra_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Peak memory that one update at d = 4096, N = 2048 takes from the allocator."""
    x, C = torch.randn(2048, 4096, device=device).to(dtype), torch.zeros(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kk.covariance_update_(C, x)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _line(case: dict[str, Any]) -> str:
    ours = case["contenders"][peers.OURS]
    others = [
        f"{name} {values['ours_is_faster']['median']:.2f}×"
        for name, values in case["contenders"].items()
        if name != peers.OURS
    ]
    mark = " launch-bound" if ours["launch_bound"] else ""
    return (
        f"{case['dtype']:9} d={case['d']:<6} N={case['n']:<5} {1e3 * ours['median_ms']:9.1f} µs "
        f"{100 * ours['of_roofline']:4.0f} % of {case['bound']:7}{mark}  {', '.join(others)}"
    )
