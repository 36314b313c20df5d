"""The table of ``kore bench init``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kore.bench.init import OFFICIAL, OURS
from kore.bench.show import headline

if TYPE_CHECKING:
    from rich.table import Table

_ABOUT = {
    "layer": "A of the 7 linears of a Llama layer, d = {width}, f = {inner}, r = {rank}",
    "covariance": "The null space of one covariance, d = {width}, r = {rank}",
    "model": "A random LLaVA of {layers} layers, d = {width}, f = {inner}, r = {rank}: capture of {tokens} tokens in "
    "{samples} samples, and A of all linears",
}


def table(result: Mapping[str, Any]) -> Table:
    """A row for each contender."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("", "s", "× ours", "range"):
        shown.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, seconds in result["median_s"].items():
        faster = result["ours_is_faster"][name]
        shown.add_row(
            name,
            f"{seconds:.3g}",
            *(("", "") if name == OURS else (f"{faster['median']:.2f}", f"{faster['least']:.2f}–{faster['most']:.2f}")),
            style="bold" if name == OURS else "",
        )
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    lines = [headline(result), _ABOUT[result["case"]].format(**result)]
    if "condition" in result:
        lines.append(
            f"Synthetic covariances of condition {result['condition']:g} with 6 outlier channels, rounded to float32"
        )
    lines.append("Energy over the smallest possible, checked in float64 before timing:")
    for name, found in result["null_spaces"].items():
        ours, official = found["energy_ratio"][OURS], found["energy_ratio"][OFFICIAL]
        lines.append(f"  {name}, d = {found['d']}: {ours:.4f} ({found['method']}); official recipe {official:.4g}")
    return lines
