"""The table and the picture of ``kore bench lora``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kore.bench.lora_peers import FROZEN, OURS, PEERS
from kore.bench.show import INK, dress, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


def table(result: Mapping[str, Any]) -> Table:
    """A row for every case with its flop floor, then one for each contender."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("layers", "fwd ms", "bwd ms", "both", "× frozen", "left", "kept MiB", "error"):
        shown.add_column(heading, justify="left" if heading == "layers" else "right", no_wrap=True)
    for case in result["cases"]:
        title = f"{case['shape']} N={case['tokens']} r={case['rank']} {case['dtype']}"
        shown.add_row(title, "", "", "floor", f"{case['contenders'][OURS]['floor']:.3f}", style="bold")
        for name, values in case["contenders"].items():
            left = values["gap_left"]
            shown.add_row(
                f"  {name}",
                *(f"{values[part]['median_ms']:.3g}" for part in ("forward", "backward")),
                f"{values['both']['median_ms']:.3g}" + ("!" if values["launch_bound"] else ""),
                "" if name == FROZEN else f"{values['over_frozen']['median']:.3f}",
                "" if left is None else f"{100 * left:.0f} %",
                f"{values['saved_bytes'] / 2**20:.2f}",
                f"{max(values['relative_error'].values()):.0e}",
                style="bold" if name == OURS else "",
            )
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    lines = [
        headline(result),
        "× frozen: time of forward and backward over that of the frozen layers with their input gradient, the median "
        "of interleaved rounds with cold caches. floor: the same of the flops alone. left: of what PEFT with A frozen "
        "takes above the floor. kept: for backward, beside parameters. error: against float64, before "
        "timing.",
    ]
    if any(values["launch_bound"] for case in result["cases"] for values in case["contenders"].values()):
        lines.append("!: the host was slower than the kernels")
    refusals = {name: why for case in result["cases"] for name, why in case["refused"].items()}
    why_not = {name: why for name, why in result["left_out"].items() if "group" not in why}
    return lines + [f"{name}: {why}" for name, why in {**why_not, **refusals}.items()]


def figure(result: Mapping[str, Any]) -> Figure:
    """Time over the frozen layers' against the rank, a panel for each shape, dtype and number of tokens."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(case["shape"] for case in result["cases"]))
    rows = list(dict.fromkeys((case["dtype"], case["tokens"]) for case in result["cases"]))
    size = (2.2 + 3.1 * len(shapes), 1.9 + 2.7 * len(rows))
    shown = Figure(figsize=size, layout="constrained")
    panels = shown.subplots(len(rows), len(shapes), squeeze=False, sharey=True)
    drawn: dict[str, Any] = {}
    for axes, (dtype, tokens) in zip(panels, rows):
        for ax, shape in zip(axes, shapes):
            chosen = [case for case in result["cases"] if (case["dtype"], case["tokens"]) == (dtype, tokens)]
            _panel(ax, sorted(_of_shape(chosen, shape), key=lambda case: int(case["rank"])), drawn)
            ax.set_title(f"{shape}, {tokens} tokens, {dtype}", fontsize=9, color=INK)
        axes[0].set_ylabel("time / frozen layers' time", fontsize=9, color=INK)
    for ax in panels[-1]:
        ax.set_xlabel("rank", fontsize=9, color=INK)
    shown.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    shown.suptitle(headline(result), fontsize=9, color=INK)
    return shown


def _of_shape(cases: Iterable[Mapping[str, Any]], shape: str) -> list[Mapping[str, Any]]:
    return [case for case in cases if case["shape"] == shape]


def _panel(ax: Axes, cases: list[Mapping[str, Any]], drawn: dict[str, Any]) -> None:
    from kore.report.figures import COLOURS

    colours = dict(zip((peer.name for peer in PEERS), itertools.cycle(COLOURS)))
    ranks = [case["rank"] for case in cases]
    floors = [case["contenders"][OURS]["floor"] for case in cases]
    style: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3)), "marker": "_", "markersize": 14}
    (drawn["flop floor"],) = ax.plot(ranks, floors, linewidth=1.2, **style)
    for name in [name for name in colours if name != FROZEN]:
        points = [
            (case["rank"], case["contenders"][name]["over_frozen"]["median"])
            for case in cases
            if name in case["contenders"]
        ]
        if points:
            style = {"linewidth": 2.2, "markersize": 6, "zorder": 3} if name == OURS else {"linewidth": 1}
            (line,) = ax.plot(*zip(*points), color=colours[name], marker="o", **{"markersize": 4, **style})
            drawn.setdefault(name, line)
    dress(ax, ranks)
