"""One family of calls of a built library against float64, in a process of its own.

    python -m benchmarks.native.checks FAMILY... [--library debug|release|registers] [--small]

The exit status is the number of checks that failed, at most 100.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch

from benchmarks.native.library import Native
from benchmarks.native.subjects import FAMILIES

SMALL = 1 << 22  # multiplications of a check that a sanitizer can wait for


def padded(rows: int, columns: int, dtype, pitch: int | None = None, scale: float = 1.0):
    """Random (rows, columns) whose rows are ``pitch`` elements apart, NaN between them."""
    pitch = pitch or (columns + 7) // 8 * 8
    storage = torch.full((rows, pitch), float("nan"), dtype=dtype, device="cuda")
    storage[:, :columns] = torch.randn(rows, columns, device="cuda") * scale
    return storage[:, :columns]


class Report:
    def __init__(self, family: str):
        self.family, self.passed, self.failed, self.worst = family, 0, 0, 0.0

    def run(self, name: str, case: Callable[[], tuple[float, float, str]]) -> None:
        """``case`` gives (error, allowed error, what else is wrong)."""
        try:
            error, allowed, fault = case()
        except Exception as exception:
            self.failed += 1
            print(f"FAIL {self.family} {name}: {type(exception).__name__} {str(exception)[:200]}", flush=True)
            if "CUDA error" in str(exception):
                raise
            return
        if error <= allowed and not fault:
            self.passed += 1
            self.worst = max(self.worst, error / allowed)
        else:
            self.failed += 1
            print(f"FAIL {self.family} {name}: error {error:.2e}, allowed {allowed:.2e} {fault}", flush=True)

    def close(self) -> None:
        print(
            f"{self.family}: {self.passed} passed, {self.failed} failed, worst {self.worst:.2f} of allowed", flush=True
        )


def where_wrong(difference, scale: float) -> str:
    """Which 64 x 64 blocks of a result are wrong, for whoever has to find out why."""
    wrong = ~(difference.abs() <= 0.05 * scale)
    count = int(wrong.sum())
    if wrong.numel() > 1 << 22:
        wrong = wrong[:2048, :2048]
    bad = torch.nonzero(wrong)
    blocks = torch.unique(bad // 64, dim=0)[:6].tolist()
    inside = torch.unique(bad % 64, dim=0)[:6].tolist()
    return f"{count} of {difference.numel()} elements, blocks {blocks}, inside {inside}" if count else ""


def covariance_case(native: Native, d: int, n: int, dtype, upper: bool, pitch: int | None = None, shifted=False):
    def case():
        torch.manual_seed(d * 7 + n)
        x = padded(n, d, dtype, pitch)
        alpha, factor = 0.5, torch.tensor(1.5, device="cuda") if d % 2 else None
        scale = alpha * (1.5 if d % 2 else 1.0)
        buffer = torch.randn(d + 1, d, device="cuda")
        start = buffer[1:] if shifted else buffer[:d]
        mine = torch.ones(d, d, dtype=torch.bool, device="cuda")
        mine = mine.triu() if upper else mine.tril()
        start[~mine] = float("nan")
        results = []
        for _ in range(2):
            C = buffer.clone()
            view = C[1:] if shifted else C[:d]
            native.covariance(view, x, alpha, upper, factor)
            torch.cuda.synchronize()
            results.append(view)
        same = torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))
        fault = "" if same else "not the same bits twice; "
        got = results[0]
        if not torch.equal(got[~mine].view(torch.int32), start[~mine].view(torch.int32)):
            fault += "wrote outside the triangle; "
        update = torch.zeros(d, d, dtype=torch.float64, device="cuda")
        for rows in x.split(1024):
            update.addmm_(rows.double().T, rows.double(), alpha=scale)
        expected = torch.where(mine, start.double() + update, 0.0)
        difference = torch.where(mine, got.double() - expected, 0.0)
        norm = torch.where(mine, update, 0.0).norm().item() + torch.where(mine, start.double(), 0.0).norm().item()
        error = (difference.norm() / max(norm, 1e-30)).item()
        allowed = 2e-5 + 5e-9 * n  # tensor cores truncate
        if not error <= allowed:
            fault += where_wrong(difference, expected.abs().max().item())
        return error, allowed, fault

    return case


def products_case(
    native: Native, m: int, n: int, k: int, r: int, dtype, majors: str, *, bias=False, add=False, extra=0
):
    """majors: "KK" x W^T, "KM" g W, "MM" g^T h. r 0: one product. extra: padding columns of out beyond R's."""

    def case():
        torch.manual_seed(m + n * 3 + k * 5 + r * 7)

        def left(columns):
            return padded(m, columns, dtype) if majors[0] == "K" else padded(columns, m, dtype).T

        def right(rows):
            return padded(n, rows, dtype).T if majors[1] == "K" else padded(rows, n, dtype)

        L, R = left(k), right(k)
        P, Q = (left(r), right(r)) if r else (None, None)
        b = torch.randn(n, device="cuda").to(dtype) if bias else None
        added = padded(m, n, dtype) if add else None
        scaling = 0.75
        pitch = (n + extra + 7) // 8 * 8 + 8
        results = []
        for _ in range(2):
            storage = torch.full((m, pitch), float("nan"), dtype=dtype, device="cuda")
            native.two_products(storage[:, : n + extra], L, R, b, P, Q, scaling, added)
            torch.cuda.synchronize()
            results.append(storage)
        fault = "" if torch.equal(*(s.view(torch.int16) for s in results)) else "not the same bits twice; "
        got = results[0]
        if not got[:, n + extra :].isnan().all():
            fault += "wrote beyond its columns; "
        if extra and got[:, n : n + extra].ne(0).any():
            fault += "padding is not zero; "
        expected = L.double() @ R.double() if r else scaling * (L.double() @ R.double())
        if P is not None:
            expected += scaling * (P.double() @ Q.double())
        if b is not None:
            expected += b.double()
        if added is not None:
            expected += added.double()
        norm = expected.norm().item()
        difference = got[:, :n].double() - expected
        allowed = 1.05 * (expected.to(dtype).double() - expected).norm().item() / norm + 2e-5
        error = difference.norm().item() / norm
        if not error <= allowed:
            fault += where_wrong(difference, expected.abs().max().item())
        return error, allowed, fault

    return case


def check(family: str, library: str, small: bool) -> int:
    native, report = Native(library), Report(family)
    bf16, fp16 = torch.bfloat16, torch.float16
    short = library != "debug" and "KORE_CUDA_KERNELS" not in os.environ

    def products(m, n, k, r, dtype, majors, **options):
        if small and m * n * (k + r) > SMALL:
            return
        extras = "".join(f" {name}" for name, value in options.items() if value)
        name = f"{majors} {m}x{n}x{k} r={r} {dtype}{extras}"
        report.run(name, products_case(native, m, n, k, r, dtype, majors, **options))

    def covariance(d, n, dtype, upper, **options):
        if small and d * d * n > SMALL:
            return
        name = f"d={d} n={n} {dtype} {'upper' if upper else 'lower'} {options or ''}"
        report.run(name, covariance_case(native, d, n, dtype, upper, **options))

    if family in ("forward", "input_gradient"):
        majors = "KK" if family == "forward" else "KM"
        products(128, 128, 64, 0, bf16, majors)
        products(256, 256, 64, 0, bf16, majors)
        products(2048, 4096, 64, 0, bf16, majors)
        products(2048, 4096, 256, 16, bf16, majors)
        products(2048, 4104, 1000, 240, bf16, majors, bias=True)
        products(2049, 4096, 4096, 256, fp16, majors, bias=True)
        if not short:
            for m, n, k, r in ((1, 8, 8, 16), (5, 1000, 72, 240), (333, 264, 1000, 48), (129, 11008, 520, 235)):
                for dtype in (bf16, fp16):
                    products(m, n, k, r, dtype, majors, bias=n > 100)
            products(8192, 4096, 4096, 256, bf16, majors, bias=True)
            products(4096, 11008, 256, 0, bf16, majors, add=True)
            products(300, 1000, 235, 0, fp16, majors, add=True)
    if family == "narrow":
        for m, n, k, majors in (
            (8192, 256, 4096, "KK"), (8192, 240, 4096, "KM"), (4096, 256, 8192, "MM"), (11008, 240, 2048, "MM"),
            (333, 16, 1000, "KK"), (1, 240, 4096, "KM"), (1000, 48, 333, "MM"), (64, 64, 64, "MM"),
        ):  # fmt: skip
            products(m, n, k, 0, bf16, majors)
        products(8192, 235, 4096, 0, bf16, "KK", extra=5)
        products(333, 235, 11008, 0, fp16, "KK", extra=5)
        products(2048, 2048, 2048, 0, fp16, "MM")
    if family == "covariance":
        covariance(64, 64, bf16, False)
        covariance(256, 64, bf16, False)
        covariance(512, 256, bf16, False)
        for d in (1, 7, 100, 235, 257, 1000) if not short else (235, 1000):
            for n in (0, 1, 333, 2048, 2049) if not short else (333,):
                covariance(d, n, bf16, d % 3 == 0)
                covariance(d, n, fp16, d % 3 != 0, shifted=True)
        covariance(1000, 600, bf16, True, pitch=2048)
        covariance(1000, 600, bf16, False, pitch=1008, shifted=True)
    if family == "covariance_large":
        for d, n in ((4096, 333), (4096, 2049), (4095, 700), (11008, 2048)) if not short else ((4096, 2048),):
            for upper in (False, True):
                covariance(d, n, bf16, upper)
        if not short:
            covariance(4096, 8192, fp16, False)
    report.close()
    return report.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", nargs="+", choices=FAMILIES)
    parser.add_argument("--library", default="debug")
    parser.add_argument("--small", action="store_true", help="only what is small")
    options = parser.parse_args()
    return min(sum(check(family, options.library, options.small) for family in options.family), 100)


if __name__ == "__main__":
    sys.exit(main())
