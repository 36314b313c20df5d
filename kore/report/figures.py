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
    points: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    baseline: Sequence[float],
    intervals: Mapping[str, Sequence[tuple[float | None, float | None]]] | None = None,
) -> Figure:
    """Every method as a point: what it learned (K.A) against what it kept (K.R); up and right is better.

    Args:
        points: For each name one (K.A, K.R), or several, one a seed: drawn small, their mean large.
        baseline: (K.A, K.R) of the untouched model. Faint lines join points of equal HARS.
        intervals: For each name (low, high) of K.A and of K.R, drawn as a cross; what lies outside the points' frame
            is cut off.
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
        middle = cloud.mean(0)
        for axis, (least, most) in enumerate((intervals or {}).get(name, ())):
            if least is not None and most is not None:
                line = np.array([middle, middle])
                line[:, axis] = least, most
                ax.plot(*line.T, color=colour, linewidth=1.1, alpha=0.5)
        ax.plot(*middle, marker="o", color=colour, markersize=9, linestyle="none")
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
        cells = pooled(_array(covariance))
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


def leak_per_layer(leaks: Mapping[str, Mapping[str, float]], label: str = "leak  ‖xU‖² / ‖x‖²") -> Figure:
    """Share of the input energy that the adapter reads, per layer, one panel for each kind of module.

    Args:
        leaks: For each name (for example old and new inputs) the leak of every module. Names stand for lines,
            ones that begin with "random" for dashed lines without colour.
        label: What the values are, where they are another positive quantity of every module.
    """
    kinds: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, leak in leaks.items():
        for order, (module, value) in enumerate(leak.items()):
            layer = re.search(r"\.(\d+)\.", module)
            place = int(layer.group(1)) if layer else order
            kinds.setdefault(module_kind(module), {}).setdefault(name, []).append((place, value))
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
    figure.supylabel(label, fontsize=9, color=_INK)
    if axes:
        _legend(figure, axes[0], len(leaks))
    return figure


def heat_map_table(maps: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Covariance heat maps of several data sets side by side, each relative to its largest cell.

    Args:
        maps: For each row title (a module) and column title (a data set) a square array, pooled already or not. One
            logarithmic scale of at most four decades holds for all.
    """
    columns = max((len(row) for row in maps.values()), default=0)
    figure, axes = _grid(len(maps), columns, height=0.6 + 1.6 * len(maps), width=min(9.6, 2.2 + 1.9 * columns))
    cells = {(title, name): pooled(_array(matrix)) for title, row in maps.items() for name, matrix in row.items()}
    cells = {key: np.log10(np.maximum(map_ / max(map_.max(), 1e-300), 1e-4)) for key, map_ in cells.items()}
    low = min((float(map_.min()) for map_ in cells.values()), default=-1.0) or -1.0
    image = None
    for index, (title, row) in enumerate(maps.items()):
        for ax, name in zip(axes[index * columns :], row):
            image = ax.imshow(cells[title, name], cmap="magma", vmin=low, vmax=0)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            if index == 0:
                ax.set_title(name, fontsize=8.5, color=_INK)
        axes[index * columns].set_ylabel(_short(title), fontsize=7.5)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[low, 0], pad=0.015)
        bar.ax.set_yticklabels([f"max × {10**low:.2g}", "max"], fontsize=8, color=_INK)
        bar.outline.set_visible(False)
    return figure


def similarity_matrices(names: Sequence[str], matrices: Mapping[str, Any]) -> Figure:
    """Square matrices over data sets with their values written in, one panel for each measure.

    Args:
        names: The data sets, in the order of rows and columns.
        matrices: For each title an (n, n) array of values up to 1.
    """
    size = 1.4 + 0.5 * len(names)
    figure, axes = _grid(1, len(matrices), height=size, width=min(9.6, (size + 0.5) * max(1, len(matrices))))
    for ax, (title, matrix) in zip(axes, matrices.items()):
        values = _array(matrix)
        ax.imshow(values, cmap="viridis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(values):
            shade = "white" if value < 0.6 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=8)
        ax.set_title(title, fontsize=8.5, color=_INK)
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right")
        ax.set_yticks(range(len(names)), names)
        ax.grid(False)
    return figure


def spectra_by_kind(spectra: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Eigenvalues of every covariance, relative to the largest: a row for each data set, a column for each kind.

    Args:
        spectra: For each data set and module its eigenvalues, descending. Lines of a panel are layers, from dark
            (first) to light (last).
    """
    from matplotlib import colormaps

    kinds = list(dict.fromkeys(module_kind(module) for modules in spectra.values() for module in modules))
    figure, axes = _grid(len(spectra) if kinds else 0, len(kinds), height=0.7 + 1.75 * len(spectra), share=True)
    for row, (name, modules) in enumerate(spectra.items()):
        for column, kind in enumerate(kinds):
            ax = axes[row * len(kinds) + column]
            lines = [_array(values) for module, values in modules.items() if module_kind(module) == kind]
            for index, values in enumerate(lines):
                values = np.maximum(values / max(values[0], np.finfo(float).tiny), 1e-12)
                colour = colormaps["viridis"](0.05 + 0.85 * index / max(1, len(lines) - 1))
                ax.semilogy(np.linspace(0, 1, len(values)), values, color=colour, linewidth=1)
            if row == 0:
                ax.set_title(kind, fontsize=8.5, color=_INK)
        axes[row * len(kinds)].set_ylabel(name)
    figure.supxlabel("direction, as a share of d_in", fontsize=9, color=_INK)
    return figure


def discard_curves(panels: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Figure:
    """Relative output error over the share of components discarded, one panel for each title.

    Args:
        panels: For each title and method (share, error), both vectors.
    """
    columns = min(4, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure, axes = _grid(rows, columns, height=1.9 * rows + 0.75, share=True)
    for ax, (title, curves) in zip(axes, panels.items()):
        for colour, (method, (share, error)) in zip(_colours(), curves.items()):
            error = np.where(_array(error) > 0, _array(error), np.nan)
            ax.semilogy(_array(share), error, color=colour, linewidth=1.4, label=method)
        ax.set_title(title, fontsize=8.5, color=_INK)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("share of components discarded", fontsize=9, color=_INK)
    figure.supylabel("‖(W0 − W_r) x‖ / ‖W0 x‖", fontsize=9, color=_INK)
    _legend(figure, axes[0], max((len(curves) for curves in panels.values()), default=0))
    return figure


def type_bars(
    scores: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]], label: str = "mean of CEM and F1"
) -> Figure:
    """A bar for every question type and name, with its interval, types from the top down (the paper's Figure 5).

    Args:
        scores: For each name and type (value, low, high) in percent; low and high may be None.
        label: What the values are.
    """
    types = list(dict.fromkeys(kind for each in scores.values() for kind in each))
    figure, axes = _grid(1, 1, height=0.9 + max(1, len(types)) * (0.16 + 0.17 * max(1, len(scores))))
    thick = 0.8 / max(1, len(scores))
    for number, (colour, (name, each)) in enumerate(zip(_colours(), scores.items())):
        places = np.array([types.index(kind) for kind in each]) + (number - (len(scores) - 1) / 2) * thick
        values = np.array([value for value, _, _ in each.values()])
        axes[0].barh(places, values, thick * 0.92, color=colour, label=name, alpha=0.85)
        for place, (_, low, high) in zip(places, each.values()):
            if low is not None and high is not None:
                axes[0].plot([low, high], [place, place], color=_INK, linewidth=1, alpha=0.75)
    axes[0].set_yticks(range(len(types)), types)
    axes[0].set(xlabel=label, xlim=(0, None))
    axes[0].invert_yaxis()
    axes[0].grid(False, axis="y")
    _legend(figure, axes[0], len(scores))
    return figure


def measured_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float | None, float | None]]], across: str, up: str
) -> Figure:
    """Measured values over a quantity, with their intervals as bars.

    Args:
        curves: For each name (place, value, low, high); low and high may be None.
        across: What the places are.
        up: What the values are.
    """
    figure, axes = _grid(1, 1, height=3.4)
    for colour, (name, points) in zip(_colours(), curves.items()):
        places = [point[0] for point in points]
        axes[0].plot(places, [point[1] for point in points], color=colour, marker="o", markersize=4, label=name)
        for place, _, low, high in points:
            if low is not None and high is not None:
                axes[0].plot([place, place], [low, high], color=colour, linewidth=1.1, alpha=0.5)
    axes[0].set(xlabel=across, ylabel=up)
    _legend(figure, axes[0], len(curves))
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def module_kind(module: str) -> str:
    """What a module is called in every layer: its name after the layer number, ``self_attn.q_proj``."""
    return re.sub(r"^.*\.\d+\.", "", module)


def pooled(matrix: np.ndarray) -> np.ndarray:
    """Mean of |entries| over at most 32 x 32 nearly equal blocks of a square matrix; a smaller one stays as it is."""
    size = matrix.shape[0]
    cells = min(size, _HEAT_MAP_CELLS)
    edges = np.linspace(0, size, cells + 1).astype(int)
    widths = np.diff(edges)
    sums = np.add.reduceat(np.add.reduceat(np.abs(matrix), edges[:-1], axis=0), edges[:-1], axis=1)
    return sums / np.outer(widths, widths)


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
