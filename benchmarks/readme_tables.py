"""The README's tables, generated from the results stored in benchmarks/results.

python -m benchmarks.readme_tables            # rewrite README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def _load(name: str) -> dict[str, Any]:
    return dict(json.loads((HERE / "results" / name).read_text(encoding="utf-8")))


def demo() -> str:
    """The comparison of `kore demo`."""
    result = _load("demo.json")
    columns = ("K.A", "K.R", "Avg", "HARS")
    lines = [
        "| method | trained parameters | learning rate | " + " | ".join(columns) + " |",
        "|---|--:|--:|" + "--:|" * len(columns),
    ]
    for row in result["table"]:
        cells = [_mean(row[column]) for column in columns]
        trained = f"{row['trained_parameters'] / 1000:.0f} k" if row["trained_parameters"] else "–"
        rate = "–" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        lines.append(f"| {row['method']} | {trained} | {rate} | {' | '.join(cells)} |")
    where = f"Mean ± standard deviation over {result['seeds']} seeds, {_where(result['environment'])}."
    return "\n".join(lines) + f"\n\n{where}"


def _mean(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    spread = "" if value["spread"] is None else f" ± {value['spread']:.1f}"
    return f"{value['mean']:.1f}{spread}"


def kernels() -> str:
    """The CPU ratios of `python -m benchmarks.cpu_suite`."""
    stored = _load("cpu.json")
    lines = ["| operation | beside | speed-up |", "|---|---|--:|"]
    for row in stored["results"]:
        low, high = row["speed_up_range"]
        lines.append(f"| {row['case']} | `{row['peer']}` | {row['speed_up']:.2f} × ({low:.2f}–{high:.2f}) |")
    where = (
        f"Median ratio (smallest–largest) of {stored['results'][0]['rounds']} interleaved rounds, "
        f"{stored['threads']} threads, {_where(stored['environment'])}. No GPU result exists yet."
    )
    return "\n".join(lines) + f"\n\n{where}"


def _where(environment: dict[str, Any]) -> str:
    return f"{environment['processor']}, torch {environment['torch']}, commit {str(environment['commit'])[:7]}"


TABLES = {"demo": demo, "kernels": kernels}


def rewritten(text: str) -> str:
    """``text`` with every table between its markers made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)"
        text, count = re.subn(pattern, lambda match, t=table: f"{match[1]}{t()}\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: expected one block between <!-- table:{name} --> and <!-- /table -->")
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
