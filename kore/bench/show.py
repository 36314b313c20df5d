"""The table, the picture and the file of a ``kore bench covariance`` run, and what other runs share of them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.bench.peers import OURS, PEERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

INK, GRID = "#22272d", "#e6e9e5"


def table(result: Mapping[str, Any]) -> Table:
    """A row per case and contender: its time, its share of the roofline, its ratio to ours, its error."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("x", "d", "N", "", "time", "roof", "× ours", "range", "error"):
        shown.add_column(heading, justify="left" if heading in ("x", "") else "right", no_wrap=True)
    for case in result["cases"]:
        for name, values in case["contenders"].items():
            ours, ratio = name == OURS, values["ours_is_faster"]
            shown.add_row(
                *((case["dtype"], str(case["d"]), str(case["n"])) if ours else ("", "", "")),
                name,
                _milliseconds(values["median_ms"]) + ("!" if values["launch_bound"] else ""),
                f"{100 * values['of_roofline']:.0f} % {case['bound'][:1]}",
                *(("", "") if ours else (f"{ratio['median']:.2f}", f"{ratio['least']:.2f}–{ratio['most']:.2f}")),
                f"{values['relative_error']:.0e}",
                style="bold" if ours else "",
            )
    return shown


def headline(result: Mapping[str, Any]) -> str:
    """Where and with what a result was measured."""
    machine = result["machine"]
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    where = result["environment"]["processor"] if machine["device"] == "cpu" else machine["device"]
    return f"{where}{threads}, backend {result['backend']}, commit {result['environment']['commit']}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    roofline = result["roofline"]
    rates = ", ".join(f"{name} {_rate(rate)}" for name, rate in roofline["flops_per_second"].items())
    lines = [
        headline(result),
        f"measured: products {rates}; copy {roofline['bytes_per_second'] / 1e9:.1f} GB/s",
        "× ours: how many times as long as ours, the median and range of interleaved rounds with cold caches. error: "
        "against float64, checked before timing. roof: share of the roofline, which compute (c) or memory (m) sets.",
    ]
    if any(case["dtype"] != "float32" for case in result["cases"]):
        lines.append("addmm_ gets a two-byte x as float32, converted before the clock starts.")
    if any(case["contenders"][OURS]["launch_bound"] for case in result["cases"]):
        lines.append("!: the host was slower than the kernel")
    refusals = {name: why for case in result["cases"] for name, why in case["refused"].items()}
    for dtype, reasons in result["left_out"].items():
        lines += [f"{name} ({dtype}): {why}" for name, why in reasons.items() if "installed" in why]
    return lines + [f"{name}: {why}" for name, why in refusals.items()]


def figure(result: Mapping[str, Any]) -> Figure:
    """Useful flop/s over N, a panel for each dtype and d: the measured roofline, ours, and the peers."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(case["dtype"] for case in result["cases"]))
    dims = sorted({case["d"] for case in result["cases"]})
    size = (2.2 + 3.1 * len(dims), 1.4 + 2.7 * len(dtypes))
    shown = Figure(figsize=size, layout="constrained")
    panels = shown.subplots(len(dtypes), len(dims), squeeze=False, sharex=True, sharey="row")
    drawn: dict[str, Any] = {}
    for row, dtype in zip(panels, dtypes):
        for ax, d in zip(row, dims):
            cases = [case for case in result["cases"] if case["dtype"] == dtype and case["d"] == d]
            _panel(ax, sorted(cases, key=lambda case: case["n"]), drawn)
            ax.set_title(f"{dtype} x, d = {d}", fontsize=9, color=INK)
        row[0].set_ylabel("useful flop/s", fontsize=9, color=INK)
    for ax in panels[-1]:
        ax.set_xlabel("N, rows of x", fontsize=9, color=INK)
    shown.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    shown.suptitle(headline(result), fontsize=9, color=INK)
    return shown


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result; a kill at any moment leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _panel(ax: Axes, cases: list[Mapping[str, Any]], drawn: dict[str, Any]) -> None:
    from kore.report.figures import COLOURS

    colours = dict(zip((peer.name for peer in PEERS), itertools.cycle(COLOURS)))
    n = [case["n"] for case in cases]
    work = [case["n"] * case["d"] * (case["d"] + 1) for case in cases]
    roof = [flops / (1e-3 * case["floor_ms"]) for flops, case in zip(work, cases)]
    (drawn["measured roofline"],) = ax.loglog(n, roof, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    for name in cases[0]["contenders"]:
        points = [
            (case["n"], flops / (1e-3 * case["contenders"][name]["median_ms"]))
            for case, flops in zip(cases, work)
            if name in case["contenders"]
        ]
        style = {"linewidth": 2.2, "markersize": 6, "zorder": 3} if name == OURS else {"linewidth": 1, "markersize": 3}
        (line,) = ax.plot(*zip(*points), color=colours[name], marker="o", **style)
        drawn.setdefault(name, line)
    dress(ax, n)


def dress(ax: Axes, ticks: Sequence[int]) -> None:
    """A light grid, and the given ticks on the lower axis."""
    ax.grid(True, which="major", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xticks(ticks, [str(value) for value in ticks])
    ax.minorticks_off()
    ax.tick_params(labelsize=8, color=GRID, labelcolor=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _milliseconds(value: float) -> str:
    """Three digits, in ms or µs."""
    return f"{value:.3g} ms" if value >= 1 else f"{1e3 * value:.3g} µs"


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} Tflop/s" if flops >= 1e12 else f"{flops / 1e9:.0f} Gflop/s"
