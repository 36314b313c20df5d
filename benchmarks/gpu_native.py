"""The CUDA kernels of csrc/cuda on an Ampere or newer GPU, straight through the C ABI: correctness, then times.

    python benchmarks/gpu_native.py [--build-only] [--skip-debug] [--sanitize]

Builds build/native/*.so with nvcc unless they are of the same sources. Every family of calls is checked against float64
in a process of its own: Hopper's kernels with a build in which a barrier that waits for five seconds is an error, then
as they are shipped, then those of Ampere, which a Hopper GPU runs too. Then they are timed beside cuBLAS, interleaved,
the L2 cache flushed, medians.

--sanitize runs the small checks under compute-sanitizer's memcheck, racecheck and synccheck instead, if that tool is in
PATH or beside nvcc.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "native"
BUILDS = {"debug": ["-DKORE_DEBUG_HANG"], "release": [], "registers": ["-DKORE_ADD_FROM_REGISTERS"]}
NVCC = "nvcc -O3 -std=c++17 -Xcompiler -fPIC -DKORE_HOPPER -DKORE_AMPERE"
# Machine code of 8.0 does not run on 9.0, so that the kernels of Ampere are compiled for both.
TARGETS = {
    "hopper": ["-gencode=arch=compute_90a,code=sm_90a"],
    "ampere": ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"],
}
# What is checked: a build, and the environment that chooses the kernels.
CHECKED = {
    "hopper, debug": ("debug", {}),
    "hopper": ("release", {}),
    "ampere": ("release", {"KORE_CUDA_KERNELS": "sm80"}),
}
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SMALL = 1 << 22  # multiplications of a check that a sanitizer can wait for
FAMILIES = ("forward", "input_gradient", "narrow", "covariance", "covariance_large")
SECONDS = 60  # for one family
ROUNDS = 11


def build() -> None:
    """Compiles everything unless it was compiled from exactly these sources."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(SOURCES.iterdir()), ROOT / "csrc" / "kore.h"]
    stamp = BUILD / "sources.sha256"
    content = b"".join(path.read_bytes() for path in (*sources, Path(__file__)))
    digest = hashlib.sha256(content).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    stamp.unlink(missing_ok=True)
    running: dict[Path, subprocess.Popen] = {}
    objects: dict[str, list[Path]] = {name: [] for name in BUILDS}
    for unit in (path for path in sources if path.suffix == ".cu"):
        generation = unit.stem.partition("_")[0]
        for name, defines in BUILDS.items():
            own = generation == "hopper"
            target = BUILD / (f"{unit.stem}-{name}.o" if own else f"{unit.stem}.o")
            objects[name].append(target)
            if target not in running:
                command = [*NVCC.split(), *TARGETS.get(generation, TARGETS["ampere"]), *(defines if own else [])]
                running[target] = _start([*command, "-c", str(unit), "-o", str(target)])
    compiled = [_finished(target.name, process) for target, process in running.items()]
    if not all(compiled):
        return
    linked = [
        _finished(name, _start(["nvcc", "-shared", "-cudart", "static", *map(str, parts), "-o", f"{BUILD / name}.so"]))
        for name, parts in objects.items()
    ]
    if all(linked):
        stamp.write_text(digest)
        print(f"built {', '.join(objects)}", flush=True)


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finished(name: str, process: subprocess.Popen) -> bool:
    output = process.communicate()[0]
    if process.returncode:
        print(f"FAIL {name}: {output}", flush=True)
    return process.returncode == 0


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("rows", "columns", "stride_row", "stride_column")
    ]


class Native:
    """The library's functions on tensors."""

    def __init__(self, name: str):
        self.library = ctypes.CDLL(str(BUILD / f"{name}.so"))
        self.library.kore_cuda_covariance_workspace.restype = ctypes.c_int64
        self.library.kore_cuda_two_products_workspace.restype = ctypes.c_int64
        self.library.kore_cuda_message.restype = ctypes.c_char_p
        self.workspace = None

    def covariance(self, C, x, alpha=1.0, upper=False, factor=None) -> None:
        n, d = x.shape
        space = self._space(self.library.kore_cuda_covariance_workspace(ctypes.c_int64(n), ctypes.c_int64(d)))
        self._check(
            self.library.kore_cuda_covariance_update(
                _pointer(C), ctypes.c_int64(d), _pointer(x), ctypes.c_int64(n), ctypes.c_int64(x.stride(0)),
                _code(x), ctypes.c_float(alpha), _pointer(factor), int(upper), _pointer(space),
                ctypes.c_int64(space.numel()), _stream(),
            )
        )  # fmt: skip

    def two_products(self, out, L, R, bias=None, P=None, Q=None, scaling=1.0, add=None) -> None:
        matrices = {
            name: _matrix(t) for name, t in (("out", out), ("L", L), ("R", R), ("P", P), ("Q", Q), ("add", add))
        }
        space = self._space(
            self.library.kore_cuda_two_products_workspace(matrices["out"], matrices["L"], matrices["P"])
        )
        self._check(
            self.library.kore_cuda_two_products(
                matrices["out"], matrices["L"], matrices["R"], _pointer(bias), matrices["P"], matrices["Q"],
                ctypes.c_float(scaling), matrices["add"], _code(L), _pointer(space), ctypes.c_int64(space.numel()),
                _stream(),
            )
        )  # fmt: skip

    def _space(self, size: int):
        import torch

        if self.workspace is None or self.workspace.numel() < size:
            self.workspace = torch.full((max(size, 16),), 255, dtype=torch.uint8, device="cuda")  # float32 NaN
        return self.workspace

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}, CUDA: {self.library.kore_cuda_message().decode()}")


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _matrix(tensor):
    return None if tensor is None else ctypes.byref(Matrix(tensor.data_ptr(), *tensor.shape, *tensor.stride()))


def _code(tensor) -> int:
    return {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}[str(tensor.dtype)]


def _stream():
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


# ---- Correctness


def padded(rows: int, columns: int, dtype, pitch: int | None = None, scale: float = 1.0):
    """Random (rows, columns) whose rows are ``pitch`` elements apart, NaN between them."""
    import torch

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
    import torch

    wrong = ~(difference.abs() <= 0.05 * scale)
    count = int(wrong.sum())
    if wrong.numel() > 1 << 22:
        wrong = wrong[:2048, :2048]
    bad = torch.nonzero(wrong)
    blocks = torch.unique(bad // 64, dim=0)[:6].tolist()
    inside = torch.unique(bad % 64, dim=0)[:6].tolist()
    return f"{count} of {difference.numel()} elements, blocks {blocks}, inside {inside}" if count else ""


def covariance_case(native: Native, d: int, n: int, dtype, upper: bool, pitch: int | None = None, shifted=False):
    import torch

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
    import torch

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
    import torch

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


# ---- Times


class Timer:
    """Medians of interleaved runs in milliseconds, the L2 cache flushed before each."""

    def __init__(self):
        import torch

        self.torch = torch
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        torch = self.torch
        for name in list(calls):
            try:
                for _ in range(2):
                    calls[name]()
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"FAIL {name}: {str(error)[:200]}", flush=True)
                del calls[name]
        times: dict[str, list] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                begin.record()
                call()
                end.record()
                times[name].append((begin, end))
        torch.cuda.synchronize()
        return {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in times.items()}


def time_covariance(timer: Timer, release: Native, registers: Native, d: int, n: int) -> None:
    import torch

    x = torch.randn(n, d, device="cuda").bfloat16()
    C = torch.zeros(d, d, device="cuda")
    out = torch.empty(d, d, device="cuda", dtype=torch.bfloat16)
    times = timer(
        {
            "kore": lambda: release.covariance(C, x),
            "kore upper": lambda: release.covariance(C, x, upper=True),
            "kore, added from registers": lambda: registers.covariance(C, x),
            "mm": lambda: torch.mm(x.T, x, out=out),
        }
    )
    flops = d * (d + 1) * n
    bound = max(flops / 790e12, 4 * d * d / 3.35e12) * 1e3
    shown = [f"{name} {ms:.4f} ({flops / ms / 1e9:.0f})" for name, ms in times.items()]
    best = min((ms for name, ms in times.items() if name != "mm"), default=float("nan"))
    print(f"d={d} n={n}: {', '.join(shown)}; bound {bound:.4f} = {bound / best:.0%} of kore", flush=True)


def time_products(timer: Timer, native: Native, d_in: int, d_out: int, r: int, m: int = 8192) -> None:
    import torch

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
    t = timer(calls)
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
    import torch

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    timer, release, registers = Timer(), Native("release"), Native("registers")
    calls = [
        (time_products, (timer, release, d_in, d_out, r))
        for d_in, d_out in ((4096, 4096), (4096, 11008), (11008, 4096))
        for r in (256, 240)
    ]
    calls += [(time_covariance, (timer, release, registers, d, n)) for d in (4096, 11008) for n in (600, 2048, 8192)]
    print("ms (TFLOP/s); a covariance has d(d+1)N flops, cuBLAS's mm does twice that", flush=True)
    for function, arguments in calls:
        try:
            function(*arguments)
        except Exception:
            traceback.print_exc()


def in_process(*arguments: str, before: list[str] | None = None, environment: dict[str, str] | None = None):
    return subprocess.Popen(
        [*(before or []), sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def show(name: str, process: subprocess.Popen, seconds: float) -> None:
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + f"FAIL {name}: no end after {seconds:.0f} s"
    print(f"[{name}] {output.strip()[-6000:]}", flush=True)
    if process.returncode:
        print(f"[{name}] exit status {process.returncode}", flush=True)


def sanitize() -> None:
    """The small checks of each generation under each tool, one at a time."""
    tool = shutil.which("compute-sanitizer")
    beside = Path(shutil.which("nvcc") or "").resolve().parent / "compute-sanitizer"
    if tool is None and not beside.exists():
        print("skipped: compute-sanitizer is neither in PATH nor beside nvcc; it comes with the CUDA toolkit")
        return
    build()
    for sanitizer in SANITIZERS:
        before = [tool or str(beside), "--tool", sanitizer, "--error-exitcode", "9", "--print-limit", "5"]
        for name in ("hopper", "ampere"):
            library, environment = CHECKED[name]
            for family in FAMILIES:
                arguments = ("--check", family, "--library", library, "--small")
                process = in_process(*arguments, before=before, environment=environment)
                show(f"{sanitizer}, {name}, {family}", process, 3 * SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", choices=FAMILIES)
    parser.add_argument("--library", default="debug")
    parser.add_argument("--small", action="store_true", help="with --check: only what is small")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--skip-debug", action="store_true")
    parser.add_argument("--sanitize", action="store_true", help="small checks under compute-sanitizer, no times")
    options = parser.parse_args()
    if options.check:
        sys.exit(min(check(options.check, options.library, options.small), 100))
    if options.times:
        return times()
    if options.sanitize:
        return sanitize()
    start = time.perf_counter()
    build()
    if options.build_only:
        return None
    for name, (library, environment) in list(CHECKED.items())[options.skip_debug :]:
        families = {
            family: in_process("--check", family, "--library", library, environment=environment) for family in FAMILIES
        }
        for family, process in families.items():
            show(f"{name}, {family}", process, SECONDS)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    show("times", in_process("--times"), 120)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return None


if __name__ == "__main__":
    main()
