"""Offline tuner of covariance_update_: run it on a GPU, and its tables of tile sizes are rewritten for that family.

    python -m benchmarks.tune_covariance                  # all three tables, then commit configs.py
    python -m benchmarks.tune_covariance --table AS_IS_TMA --dry-run

A candidate is timed only if the kernel audit accepts what it compiles to and its result agrees with float64. The best
has the smallest geometric mean of its times (medians) over the shapes. Nothing is tuned in a user's run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from unittest import mock

import torch

from benchmarks import kernel_audit
from kore_kernels.covariance_update import configs
from kore_kernels.covariance_update.configs import TritonConfig

# What a table is for: the dtype of x, whether there is a mask, and the audit's case of that name.
TABLES = {
    "AS_IS_TMA": (torch.bfloat16, False, "covariance bfloat16$"),
    "AS_IS": (torch.bfloat16, True, "covariance bfloat16 mask$"),
    "IN_PIECES": (torch.float32, False, "covariance float32( mask weight)?$"),
}
SHAPES = ((2048, 1024), (600, 4096), (2048, 4096), (2048, 11008))


def candidates(frozen: TritonConfig) -> Iterator[TritonConfig]:
    """The frozen configuration first, then every other that could be."""
    yield frozen
    for (block_i, block_j), *rest in itertools.product(
        ((64, 64), (64, 128), (128, 128), (64, 256), (128, 256)), (16, 32, 64), (4, 8), (3, 4), (2, 4)
    ):
        found = TritonConfig(block_i, block_j, *rest)
        if found != frozen:
            yield found


def accepted(table: str, family: int, config: TritonConfig) -> bool:
    """Whether the audit finds no problem in what this configuration compiles to."""
    with mock.patch.dict(getattr(configs, table), {family: config}):
        try:
            rows = kernel_audit.audit(family, TABLES[table][2])
        except Exception:
            return False  # Triton's compiler fails in as many ways as there are versions
    return bool(rows) and not any(row.problems for row in rows)


def measured(table: str, family: int, config: TritonConfig) -> float:
    """Geometric mean of the milliseconds of the shapes on this GPU; infinite if a result is wrong or does not run."""
    from triton.testing import do_bench

    with mock.patch.dict(getattr(configs, table), {family: config}):
        try:
            if not _agrees(table, 1500, 777):
                return math.inf
            times = [do_bench(_call(table, *shape)[0], return_mode="median") for shape in SHAPES]
        except RuntimeError:
            return math.inf
    return math.prod(times) ** (1 / len(times))


def _call(table: str, n: int, d: int) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
    from kore_kernels.covariance_update.triton import covariance_update

    dtype, masked, _ = TABLES[table]
    x = torch.randn(n, d, device="cuda").to(dtype)
    mask = torch.ones(n, dtype=torch.bool, device="cuda") if masked else None
    C = torch.zeros(d, d, device="cuda")
    return lambda: covariance_update(C, x, mask, None, 1.0, "lower"), C, x


def _agrees(table: str, n: int, d: int) -> bool:
    call, C, x = _call(table, n, d)
    call()
    exact = (x.double().T @ x.double()).tril()
    return bool((C.tril() - exact).norm() <= 1e-5 * exact.norm())


def tune(
    table: str,
    family: int,
    accept: Callable[[str, int, TritonConfig], bool] = accepted,
    measure: Callable[[str, int, TritonConfig], float] = measured,
) -> tuple[TritonConfig, float, float]:
    """(best configuration, its time, that of the frozen one)."""
    frozen = getattr(configs, table)[family]
    best, least = frozen, before = frozen, measure(table, family, frozen)
    for config in candidates(frozen):
        if config != frozen and accept(table, family, config):
            time = measure(table, family, config)
            if time < least:
                best, least = config, time
                print(f"{table} {family}: {least:.4g} {best}", flush=True)
    return best, least, before


def rewrite(path: Path, table: str, family: int, config: TritonConfig) -> None:
    """Put ``config`` into the table of this name in a copy of configs.py, and leave all else as it is."""
    text = path.read_text()
    entry = rf"(^{table}: .*?\n    {family}: TritonConfig\()[^)]*\)"
    numbers = ", ".join(map(str, astuple(config)))
    changed, count = re.subn(entry, rf"\g<1>{numbers})", text, count=1, flags=re.MULTILINE | re.DOTALL)
    if not count:
        raise ValueError(f"{path} has no {table}[{family}]")
    path.write_text(changed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="*", choices=TABLES, help="default: all that this family has")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave configs.py as it is")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("The tuner times kernels, and there is no GPU here. The static audit needs none.", file=sys.stderr)
        return 2
    from kore_kernels import gpu

    major, minor = torch.cuda.get_device_capability()
    family = gpu.family(10 * major + minor)
    for table in options.table or TABLES:
        if family in getattr(configs, table):
            best, time, before = tune(table, family)
            print(f"{table} {family}: {best}, {before / time:.3f} times as fast as the frozen one")
            if not options.dry_run and time < before:
                rewrite(Path(configs.__file__), table, family, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
