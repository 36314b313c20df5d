"""The figures of KORE's reports, drawn with matplotlib without its global state.

Ink and grid are drawn in two colours that :func:`to_svg` turns into the page's own, so that the same
figure reads well on a light page, on a dark page and in print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82b8", "#d9822b", "#8a6fc0", "#3f9b6e", "#c4577c", "#8c8c4a", "#5aa9b5", "#a8674a")
_INK, _GRID = "#22272d", "#e6e9e5"
_HEAT_MAP_CELLS = 32


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for an HTML page, its text kept as text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kore"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="([^"]*)"', r'\1 style="max-width: \2"', svg, count=1)
    return svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss over steps.

    Args:
        histories: For each name, log entries; those with ``step`` and ``loss`` are drawn. A long history is
            drawn as a faint raw line under its moving average.
    """
    figure, axes = _grid(1, 1, height=3.3)
    for colour, (name, history) in zip(_colours(), histories.items()):
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry and "step" in entry]
        steps, losses = np.array(points, dtype=float).reshape(-1, 2).T
        if len(steps) > 40:
            axes[0].plot(steps, losses, color=colour, linewidth=0.7, alpha=0.3)
            window = max(3, len(steps) // 25)
            losses = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, "valid")
        marker = "o" if len(steps) < 12 else None
        axes[0].plot(steps, losses, color=colour, linewidth=1.7, label=name, marker=marker, markersize=3)
    axes[0].set(xlabel="step", ylabel="training loss")
    axes[0].set_ylim(bottom=0)
    _legend(figure, axes[0], len(histories))
    return figure


def adaptation_retention_plane(
    points: Mapping[str, Sequence[float] | Sequence[Sequence[float]]], baseline: Sequence[float]
) -> Figure:
    """Every method as a point: what it learned (K.A) against what it kept (K.R); up and right is better.

    Args:
        points: For each name one (K.A, K.R), or several, one a seed: drawn small, their mean large.
        baseline: (K.A, K.R) of the untouched model. Faint lines join points of equal HARS.
    """
    from kore.metrics import hars

    figure, axes = _grid(1, 1, height=4.4, width=7.2)
    ax = axes[0]
    clouds = {name: np.array(value, dtype=float).reshape(-1, 2) for name, value in points.items()}
    everything = np.concatenate([*clouds.values(), np.array(baseline, dtype=float).reshape(1, 2)])
    low, high = everything.min(0), everything.max(0)
    margin = np.maximum((high - low) * 0.16, 1.0)
    low, high = np.maximum(low - margin, 0), high + margin * 1.3
    if baseline[0] > 0 and baseline[1] > 0:
        ka, kr = np.meshgrid(np.linspace(low[0], high[0], 80), np.linspace(low[1], high[1], 80))
        score = np.vectorize(hars)(ka, kr, *baseline)
        lines = ax.contour(ka, kr, score, levels=np.arange(10, 200, 10), colors=_GRID, linewidths=1)
        ax.clabel(lines, fmt="%d", fontsize=7.5, colors=_INK)
    ax.axhline(baseline[1], color=_INK, alpha=0.35, linewidth=0.9, linestyle=(0, (4, 4)))
    ax.plot(*baseline, marker="D", color=_INK, markersize=6, linestyle="none")
    ax.annotate(
        "untouched", (baseline[0], baseline[1]), xytext=(8, -12), textcoords="offset points", color=_INK, fontsize=9
    )
    for colour, (name, cloud) in zip(_colours(), clouds.items()):
        if len(cloud) > 1:
            ax.plot(*cloud.T, marker="o", color=colour, markersize=3.5, linestyle="none", alpha=0.55)
        ax.plot(*cloud.mean(0), marker="o", color=colour, markersize=9, linestyle="none")
        ax.annotate(name, cloud.mean(0), xytext=(8, 6), textcoords="offset points", color=colour, fontsize=9.5)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="K.A  (new knowledge)", ylabel="K.R  (old knowledge)")
    return figure


def covariance_heat_maps(covariances: Mapping[str, Any]) -> Figure:
    """|C| of a few modules, pooled to at most 32 x 32 cells, on a logarithmic scale of six decades each.

    Args:
        covariances: For each title a (d, d) tensor or array.
    """
    figure, axes = _grid(1, len(covariances), height=2.75)
    image = None
    for ax, (title, covariance) in zip(axes, covariances.items()):
        cells = _pooled(_array(covariance))
        top = max(cells.max(), np.finfo(float).tiny)
        image = ax.imshow(np.log10(np.maximum(cells / top, 1e-6)), cmap="magma", vmin=-6, vmax=0)
        ax.set_title(_short(title), fontsize=8.5, color=_INK)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes), shrink=0.8, ticks=[-6, -3, 0], pad=0.015)
        bar.ax.set_yticklabels(["10⁻⁶", "10⁻³", "max"], fontsize=8, color=_INK)
        bar.outline.set_visible(False)
    return figure


def spectra(eigenvalues: Mapping[str, Any], rank: int | None = None) -> Figure:
    """Eigenvalues of C from large to small, relative to the largest.

    Args:
        eigenvalues: For each title a vector, in any order.
        rank: If given, the ``rank`` smallest, which the adapter reads, are shaded.
    """
    figure, axes = _grid(1, len(eigenvalues), height=2.6)
    for ax, (title, values) in zip(axes, eigenvalues.items()):
        values = np.sort(_array(values))[::-1]
        values = np.maximum(values / max(values[0], np.finfo(float).tiny), 1e-12)
        ax.semilogy(np.arange(1, len(values) + 1), values, color=COLOURS[0], linewidth=1.6)
        if rank is not None and rank < len(values):
            ax.axvspan(len(values) - rank, len(values), color=COLOURS[3], alpha=0.16, linewidth=0)
        ax.set_title(_short(title), fontsize=8.5, color=_INK)
        ax.set_xlabel("direction")
        ax.set_ylim(min(1e-3, values[-1] / 2), 2)
    if axes:
        axes[0].set_ylabel("eigenvalue / largest")
    return figure


def leak_per_layer(leaks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of the input energy that the adapter reads, per layer, one panel for each kind of module.

    Args:
        leaks: For each name (for example old and new inputs) the leak of every module. Names stand for lines,
            ones that begin with "random" for dashed lines without colour.
    """
    kinds: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, leak in leaks.items():
        for order, (module, value) in enumerate(leak.items()):
            layer = re.search(r"\.(\d+)\.", module)
            place = int(layer.group(1)) if layer else order
            kinds.setdefault(module.rpartition(".")[2], {}).setdefault(name, []).append((place, value))
    columns = min(4, max(1, len(kinds)))
    rows = -(-max(1, len(kinds)) // columns)
    figure, axes = _grid(rows, columns, height=1.75 * rows + 0.75, share=True)
    for ax, (kind, curves) in zip(axes, kinds.items()):
        for name, colour in zip(leaks, _colours()):
            if name not in curves:
                continue
            layers, values = np.array(sorted(curves[name]), dtype=float).T
            style: dict[str, Any] = {"color": colour, "marker": "o" if len(layers) < 12 else None, "markersize": 3.5}
            if name.startswith("random"):
                style = {"color": _INK, "alpha": 0.5, "linestyle": (0, (4, 3)), "linewidth": 1.1}
            ax.semilogy(layers, np.maximum(values, 1e-12), label=name, **style)
        ax.set_title(kind, fontsize=8.5, color=_INK)
        if len(layers) < 12:
            ax.set_xticks(layers)
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    if kinds:
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
    figure.supxlabel("layer", fontsize=9, color=_INK)
    figure.supylabel("leak  ‖xU‖² / ‖x‖²", fontsize=9, color=_INK)
    if axes:
        _legend(figure, axes[0], len(leaks))
    return figure


def _grid(rows: int, columns: int, height: float, width: float = 9.6, share: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if columns == 0:
        return figure, []
    axes = [ax for row in figure.subplots(rows, columns, squeeze=False, sharey=share) for ax in row]
    for ax in axes:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(_GRID)
        ax.grid(True, color=_GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", color=_GRID, labelcolor=_INK, labelsize=8.5)
        ax.xaxis.label.set(color=_INK, fontsize=9)
        ax.yaxis.label.set(color=_INK, fontsize=9)
    return figure, axes


def _legend(figure: Figure, ax: Axes, count: int) -> None:
    if count > 1:
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=min(count, 5),
            frameon=False,
            fontsize=9,
            labelcolor=_INK,
        )


def _colours() -> Iterable[str]:
    while True:
        yield from COLOURS


def _short(title: str) -> str:
    """The telling end of a module name: from its layer number on."""
    layer = re.search(r"\blayers?\.\d+\..*|\bh\.\d+\..*", title)
    return layer.group(0) if layer else title


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _pooled(matrix: np.ndarray) -> np.ndarray:
    """Mean of |matrix| over at most 32 x 32 nearly equal blocks."""
    size = matrix.shape[0]
    cells = min(size, _HEAT_MAP_CELLS)
    edges = np.linspace(0, size, cells + 1).astype(int)
    widths = np.diff(edges)
    sums = np.add.reduceat(np.add.reduceat(np.abs(matrix), edges[:-1], axis=0), edges[:-1], axis=1)
    return sums / np.outer(widths, widths)
