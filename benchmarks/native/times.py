"""The CUDA kernels beside cuBLAS: interleaved, caches cold, medians."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable

import torch

from benchmarks.native.library import Native
from kore.bench.timing import Clock, in_turn, synchronize

ROUNDS = 11


def medians(clock: Clock, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of every call that works; what fails is said."""
    for name in list(calls):
        try:
            calls[name]()
            synchronize(clock.device)
        except RuntimeError as error:
            print(f"FAIL {name}: {str(error)[:200]}", flush=True)
            del calls[name]
    return {name: statistics.median(ms) for name, ms in in_turn(calls, clock.milliseconds, ROUNDS).items()}


def time_covariance(clock: Clock, release: Native, registers: Native, d: int, n: int) -> None:
    x = torch.randn(n, d, device="cuda").bfloat16()
    C = torch.zeros(d, d, device="cuda")
    out = torch.empty(d, d, device="cuda", dtype=torch.bfloat16)
    times = medians(
        clock,
        {
            "kore": lambda: release.covariance(C, x),
            "kore upper": lambda: release.covariance(C, x, upper=True),
            "kore, added from registers": lambda: registers.covariance(C, x),
            "mm": lambda: torch.mm(x.T, x, out=out),
        },
    )
    flops = d * (d + 1) * n
    bound = max(flops / 790e12, 4 * d * d / 3.35e12) * 1e3
    shown = [f"{name} {ms:.4f} ({flops / ms / 1e9:.0f})" for name, ms in times.items()]
    best = min((ms for name, ms in times.items() if name != "mm"), default=float("nan"))
    print(f"d={d} n={n}: {', '.join(shown)}; bound {bound:.4f} = {bound / best:.0%} of kore", flush=True)


def time_products(clock: Clock, native: Native, d_in: int, d_out: int, r: int, m: int = 8192) -> None:
    def new(rows, columns):
        return torch.randn(rows, columns, device="cuda").bfloat16()

    x, g, W, A, B = new(m, d_in), new(m, d_out), new(d_out, d_in), new(r, d_in), new(d_out, r)
    b = torch.randn(d_out, device="cuda").bfloat16()
    h, gB, y, dx, dB = new(m, r), new(m, r), new(m, d_out), new(m, d_in), new(d_out, r)
    merged = torch.empty_like(W)
    calls = {
        "y": lambda: native.two_products(y, x, W.T, b, h, B.T, 2.0),
        "dx": lambda: native.two_products(dx, g, W, None, gB, A, 2.0),
        "h": lambda: native.two_products(h, x, A.T),
        "gB": lambda: native.two_products(gB, g, B),
        "dB": lambda: native.two_products(dB, g.T, h, scaling=2.0),
        "W + sBA": lambda: native.two_products(merged, B, A, scaling=2.0, add=W),
        "y frozen": lambda: native.two_products(y, x, W.T, b),
        "cuBLAS y": lambda: torch.addmm(b, x, W.T, out=y),
        "cuBLAS dx": lambda: torch.mm(g, W, out=dx),
        "cuBLAS h": lambda: torch.mm(x, A.T, out=h),
        "cuBLAS gB": lambda: torch.mm(g, B, out=gB),
        "cuBLAS dB": lambda: torch.mm(g.T, h, out=dB),
    }
    t = medians(clock, calls)
    big, low = 2 * m * d_in * d_out, 2 * m * r
    flops = {
        "y": big + low * d_out, "dx": big + low * d_in, "h": low * d_in, "gB": low * d_out, "dB": low * d_out,
        "y frozen": big,
    }  # fmt: skip
    flops |= {f"cuBLAS {name}": big if name in ("y", "dx") else flops[name] for name in ("y", "dx", "h", "gB", "dB")}
    shown = [
        f"{name} {ms:.4f}" + (f" ({flops[name] / ms / 1e9:.0f})" if name in flops else "") for name, ms in t.items()
    ]
    print(f"{d_in}->{d_out} r={r}: {', '.join(shown)}", flush=True)
    try:
        frozen = t["cuBLAS y"] + t["cuBLAS dx"]
        narrow = {name: min(t.get(name, 9e9), t[f"cuBLAS {name}"]) for name in ("h", "gB", "dB")}
        ideal = 1 + r * (2 * d_in + 3 * d_out) / (2 * d_in * d_out)
        all_kore = sum(t[name] for name in ("y", "dx", "h", "gB", "dB")) / frozen
        best = (t["y"] + t["dx"] + sum(narrow.values())) / frozen
        print(f"   layer / frozen: kore {all_kore:.3f}, best of both {best:.3f}, by flops {ideal:.3f}", flush=True)
    except KeyError:
        pass


def times() -> None:
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    clock = Clock(torch.device("cuda", torch.cuda.current_device()))
    release, registers = Native("release"), Native("registers")
    calls = [
        (time_products, (clock, release, d_in, d_out, r))
        for d_in, d_out in ((4096, 4096), (4096, 11008), (11008, 4096))
        for r in (256, 240)
    ]
    calls += [(time_covariance, (clock, release, registers, d, n)) for d in (4096, 11008) for n in (600, 2048, 8192)]
    print("ms (TFLOP/s); a covariance has d(d+1)N flops, cuBLAS's mm does twice that", flush=True)
    for function, arguments in calls:
        try:
            function(*arguments)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    times()
