"""What is kept of a `kore reproduce --scale mini`: its tables, the ranks of the methods, verdicts, settings and times.

python -m benchmarks.reproduction RUN/results.json      # writes benchmarks/results/reproduction.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "results" / "reproduction.json"
MEASURES = ("K.A", "K.R", "Avg", "HARS")


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The part of ``results.json`` that tells what came out, without cells and answers."""
    tables = {name: [_line(line) for line in table["lines"]] for name, table in results["tables"].items()}
    cells = [cell for row in results["cells"].values() for cell in row]
    return {
        **{key: results[key] for key in ("scale", "quick", "worlds", "budget", "tuned", "environment", "seconds")},
        "cells": len(cells),
        "core_seconds_of_cells": round(sum(sum(cell["core_seconds"].values()) for cell in cells)),
        "tables": tables,
        "ranks": {name: ranks(results["tables"][name]["lines"]) for name in ("main", "architecture") if name in tables},
        "observations": [_observation(one) for one in results["observations"]],
    }


def _line(line: dict[str, Any]) -> dict[str, Any]:
    about = ("label", "row", "worlds", "tuned", "trainable", "learning_rate", "strength")
    values = {
        column: None if one is None else [None if end is None else round(end, 2) for end in one.values()]
        for column, one in line["values"].items()
    }
    return {**{key: line[key] for key in about}, "values": values}


def ranks(lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The ids of the rows by the mean of every measure, the best first."""
    rows = [line for line in lines if line["row"]]
    return {
        measure: [line["row"] for line in sorted(rows, key=lambda line: -line["values"][measure]["value"])]
        for measure in MEASURES
    }


def _observation(one: dict[str, Any]) -> dict[str, Any]:
    """A claim with its verdict, and how many of its parts have which."""
    kept = {key: one[key] for key in ("name", "claim", "paper", "verdict", "remark")}
    kept["parts"] = dict(Counter(part["verdict"] for part in one["parts"]))
    if "like_for_like" in one:
        same = one["like_for_like"]
        kept["like_for_like"] = {
            "verdict": same["verdict"],
            "parts": dict(Counter(part["verdict"] for part in same["parts"])),
        }
    return kept


def main(path: str) -> None:
    text = json.dumps(summary(json.loads(Path(path).read_text("utf-8"))), indent=1)
    # Lists of numbers and names on one line each.
    text = re.sub(r"\[\n\s+([^][{}]*?)\n\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    STORED.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
