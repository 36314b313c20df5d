"""What the report of ``kore run`` says of the augmentation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

_SHOWN = 10


def add_section(report: Any, out: Path) -> None:
    """Counts by task, and what could not be made; ``out`` is the result of the augment stage."""
    from kore.artifacts import read_manifest
    from kore.augmentation.export import FAILURES, reason_kind
    from kore.augmentation.run import KIND

    made = read_manifest(out, KIND, verify=False)
    failed: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    with open(out / FAILURES, encoding="utf-8") as file:
        for line in file:
            failure = json.loads(line)
            task = failure["task"] or "row"
            failed[task] += 1
            reasons[task, reason_kind(failure["reason"])] += 1
    source, total = made["made_from"], sum(made["samples"].values())
    page = f" Its quality report is {out / made['quality']}." if made["quality"] else ""
    what = f"{total:,} conversations and {made['images']:,} images from {source['items']:,} items of {source['file']}."
    report.section("Augmentation", what + page)
    tasks = list(dict.fromkeys([*made["samples"], *failed]))
    rows = [[task, made["samples"].get(task, 0), made["turns"].get(task, 0), failed[task]] for task in tasks]
    report.table(["task", "conversations", "questions", "failures"], rows)
    if reasons:
        passing = made.get("passing_failures", 0)
        again = f" Of these, {passing:,} may pass: kore run with --rerun augment tries them again." if passing else ""
        rows = [[task, reason, count] for (task, reason), count in reasons.most_common(_SHOWN)]
        report.table(
            ["task", "reason", "failures"], rows, f"The commonest reasons; {out / FAILURES} has every failure.{again}"
        )
