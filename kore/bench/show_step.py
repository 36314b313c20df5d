"""The table of ``kore bench step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kore.bench.show import headline
from kore.bench.step_peers import OURS

if TYPE_CHECKING:
    from rich.table import Table


def table(result: Mapping[str, Any]) -> Table:
    """A row for each model in training."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("", "ms", "× frozen", "tokens/s", "kept MiB", "peak MiB", "error"):
        shown.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, row in result["contenders"].items():
        shown.add_row(
            name,
            f"{row['step']['median_ms']:.4g}",
            f"{row['over_frozen']['median']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            *("" if row[size] is None else f"{row[size] / 2**20:.1f}" for size in ("saved_bytes", "peak_bytes")),
            f"{max(row['relative_error'].values(), default=0.0):.0e}",
            style="bold" if name == OURS else "",
        )
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    shape = ", ".join(f"{key} {value}" for key, value in result["shape"].items())
    lines = [
        headline(result),
        f"Llama with random weights, {shape}; {result['tokens']} tokens, {result['dtype']}",
        "A step is forward, backward and AdamW; the frozen model's stops at the gradient of its inputs. kept: for "
        "backward, beside parameters. peak: with the model and the optimizer's state, on a GPU. error: of loss and "
        f"gradients against {result['checked_against']}, before timing.",
    ]
    return lines + [f"{name}: {why}" for name, why in result["refused"].items()]
