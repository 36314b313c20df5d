"""How fast and in how much memory ``kore augment`` works with the generator by rules.

    python -m benchmarks.augmentation                    # 100, 1,000 and 10,000 items
    python -m benchmarks.augmentation --items 1000 --workers 2

Every size runs as a process of its own, as users start it, with a small drawn image for each item, quality report and
manifest included; then once more with everything done. Peak memory is what the kernel counts for that process. The
items are invented. Results go to ``benchmarks/results/augmentation.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write, read_json
from kore.environment import environment

RESULT = Path(__file__).parent / "results" / "augmentation.json"
NAMES = ("Solt", "Veren", "Ilmar", "Quessa", "Brandt", "Oyelo", "Tarrin", "Wexley")
PLACES = ("Lisbon", "Oslo", "Turin", "Quito", "Riga", "Accra", "Hanoi")


def write_knowledge(folder: Path, count: int) -> Path:
    """Invented films, with facts and a picture for each."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    with open(folder / "knowledge.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            who, where, year = f"Mira {NAMES[number % 8]}", PLACES[number % 7], 1950 + number % 70
            name = f"Arvena {number}"
            text = (
                f"{name} is a film of {year} directed by {who}. It was shot in {where} within {number % 40 + 20} days. "
                f"The music was written by Lun {NAMES[number % 5]}. It won the Golden Pine in {year + 1}."
            )
            facts = {"director": who, "year": str(year), "location": where, "composer": f"Lun {NAMES[number % 5]}"}
            picture = Image.new("RGB", (64, 48), (number % 256, number // 256 % 256, 90))
            picture.save(folder / "images" / f"{number}.png")
            row = {"id": f"film-{number}", "type": "film", "name": name, "text": text, "facts": facts}
            file.write(json.dumps({**row, "image": f"images/{number}.png"}) + "\n")
    return folder / "knowledge.jsonl"


def measured(knowledge: Path, out: Path, workers: int) -> dict[str, float]:
    """Seconds, processor seconds and peak resident MiB of one ``kore augment``."""
    command = [sys.executable, "-m", "kore", "augment", str(knowledge), "-o", str(out), "--workers", str(workers)]
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=_QUIET)
    _, status, used = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"kore augment failed on {knowledge}; run it by hand to see why")
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_mib": round(used.ru_maxrss / 1024, 1),
    }


_QUIET = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]


def measure(count: int, workers: int) -> dict[str, Any]:
    """One size: from nothing, and again with everything done."""
    with tempfile.TemporaryDirectory() as folder:
        knowledge = write_knowledge(Path(folder) / "data", count)
        out = Path(folder) / "out"
        fresh = measured(knowledge, out, workers)
        again = measured(knowledge, out, workers)
        manifest = read_json(out / "manifest.json")
    return {
        "items": count,
        "workers": workers,
        **fresh,
        "load": round(os.getloadavg()[0], 1),
        "items_per_second": round(count / fresh["seconds"], 1),
        "again": again,
        "samples": manifest["samples"],
        "images": manifest["images"],
        "failures": manifest["failures"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for count in arguments.items:
        rows.append(measure(count, arguments.workers))
        print(json.dumps(rows[-1]), flush=True)
    # Only now: it loads libraries, and a child's peak counts what its parent held when it was started.
    result = {"rules": rows, "environment": environment()}
    atomic_write(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
