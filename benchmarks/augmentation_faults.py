"""What faults and kills cost ``kore augment``: nothing. Real texts and images, real processes, scripted servers.

    python -m benchmarks.augmentation_faults               # some minutes
    python -m benchmarks.augmentation_faults --kills 1

``examples/knowledge`` goes through the command line with a chat server and an image search on loopback
(``benchmarks.augmentation_servers``): once in peace, and once with faults, killed several times at random moments and
started again, until no failure is left that may pass; one run more must ask nothing. Then the two results are compared
byte for byte. Among the results of every image search are broken and
forbidden ones, in both runs; so is an untrue round in every first dialogue, and a caption that is never true. The
numbers go to ``benchmarks/results/augmentation_faults.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.augmentation_servers import EXAMPLE, FALSE_ROUND, FORBIDDEN, KEYS, NAMES, OWN, PICTURES
from kore.artifacts import atomic_write, file_sha256, read_json

RESULT = Path(__file__).parent / "results" / "augmentation_faults.json"
ROOT = Path(__file__).parent.parent
TASKS = ("dialogue", "recognition", "caption", "vqa")


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, int]]:
    """The server process; yields its ports."""
    command = [sys.executable, "-m", "benchmarks.augmentation_servers", str(folder)]
    with open(folder / "servers.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "servers.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the servers do not start: {(folder / 'servers.log').read_text()}")
            time.sleep(0.05)
        yield read_json(folder / "servers.json")
    finally:
        process.kill()
        process.wait()


def command(out: Path, ports: dict[str, int]) -> list[str]:
    """``kore augment`` as a user would call it, in a process for which the servers' address is public."""
    place = f"{PICTURES}:{ports['pictures']}"
    loopback = {"own": OWN, "names": NAMES, "search": f"http://{place}/search.json"}
    settings = {
        "generator.api_key_env": "OPENAI_API_KEY",
        "generator.timeout": 5,
        "limits.backoff": 0.1,
        "images.delay": 0,
        "images.timeout": 5,
    }
    words = ["augment", str(EXAMPLE / "knowledge.jsonl"), "-o", str(out), "-m", "scripted", "--images", "serpapi"]
    words += ["--base-url", f"http://{OWN}:{ports['chat']}/v1", "--export", "sharegpt,openai,plain"]
    # What is inside is allowed by name and address, so that only its being private can refuse it.
    for host in (place, f"{FORBIDDEN}:{ports['inner']}", f"127.0.0.1:{ports['inner']}"):
        words += ["--allow", host]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    return [sys.executable, "-m", "benchmarks.augmentation_loopback", json.dumps(loopback), *words]


def start(out: Path, ports: dict[str, int], log: Path) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, as loud as it can be, with keys in its environment."""
    environment = {**os.environ, **KEYS, "OPENAI_LOG": "debug", "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command(out, ports), cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def finish(out: Path, ports: dict[str, int], log: Path) -> float:
    """Run to the end; the seconds it took."""
    started = time.perf_counter()
    if start(out, ports, log).wait(600) != 0:
        raise RuntimeError(f"kore augment failed: {log.read_text(errors='replace')[-2000:]}")
    return time.perf_counter() - started


def kill(out: Path, ports: dict[str, int], log: Path, after: float) -> bool:
    """Start it and kill it after so many seconds; whether it was still at work."""
    process = start(out, ports, log)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def damaged(out: Path) -> list[str]:
    """Files that are half there: JSON that does not parse, images that do not decode or are not what their name says.

    Files that are still being written, and were when the process was killed, have names of their own and do not count.
    """
    from PIL import Image

    bad = []
    for path in sorted(out.rglob("*")):
        if not path.is_file() or ".tmp-" in path.name:
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".jsonl":
                for line in path.read_text("utf-8").splitlines():
                    json.loads(line)
            elif path.suffix in (".jpg", ".png"):
                with Image.open(path) as image:
                    image.load()
                if len(path.stem) == 64 and file_sha256(path) != path.stem:
                    bad.append(f"{path}: another content than its name says")
        except (OSError, ValueError) as error:
            bad.append(f"{path}: {error}")
    return bad


def files_of(out: Path) -> dict[str, bytes]:
    """What a run made: all files but the cache and the statistics of the run."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != "cache")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(paths) if path.name != "run.json"}


def unaccounted(out: Path) -> list[str]:
    """Tasks of items that were neither made nor listed as failed."""
    items = [json.loads(line)["id"] for line in (EXAMPLE / "knowledge.jsonl").read_text("utf-8").splitlines()]
    made = [row["id"] for row in json.loads((out / "llava.json").read_text("utf-8"))]
    failed = {(row["item"], row["task"]) for row in failures(out)}
    wanted = ((item, task) for item in items for task in TASKS)
    return [f"{i} {t}" for i, t in wanted if (i, t) not in failed and not any(m.startswith(f"{i}-{t}") for m in made)]


def failures(out: Path) -> list[dict[str, Any]]:
    """What could not be made; ``passing`` where another run may make it."""
    return [json.loads(line) for line in (out / "failures.jsonl").read_text("utf-8").splitlines()]


def leaks(folder: Path) -> list[str]:
    """Files that hold a key."""
    keys = [key.encode() for key in KEYS.values()]
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [str(path) for path in files if any(key in path.read_bytes() for key in keys)]


def requests(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text("utf-8").splitlines()]


def measure(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Both runs, and what differs between them; everything is written below ``folder``."""
    rng = random.Random(seed)
    calm, rough, log = folder / "calm", folder / "rough", folder / "rough.log"
    damage, killed = [], 0
    with servers(folder) as ports:
        calm_seconds = finish(calm, ports, folder / "calm.log")
        peace = len(requests(folder))
        (folder / "faults").touch()
        # A kill before there is anything to lose would prove nothing: the first third is for the start of Python.
        for number in range(kills):
            killed += kill(rough, ports, log, calm_seconds * rng.uniform(0.3, 0.9))
            damage += [f"after kill {number + 1}: {each}" for each in damaged(rough)]
        rough_seconds = finish(rough, ports, log)
        passing = later = [row for row in failures(rough) if row.get("passing")]
        for _ in range(MOST_REPEATS):
            if later:
                finish(rough, ports, log)
                later = [row for row in failures(rough) if row.get("passing")]
        war = len(requests(folder))
        finish(rough, ports, log)
        asked = requests(folder)
    before, after = files_of(calm), files_of(rough)
    made = read_json(rough / "manifest.json")
    chat, pictures = ([r for r in asked[peace:war] if r["server"] == name] for name in ("chat", "pictures"))
    return {
        "items": made["made_from"]["items"],
        "samples": made["samples"],
        "images": made["images"],
        "failures": [f"{row['item']} {row['task']}: {row['reason']}" for row in failures(rough)],
        "images_not_had": Counter(_kind(problem) for problem in read_json(calm / "run.json")["image_problems"]),
        "kills": killed,
        "seconds": {"calm": round(calm_seconds, 1), "last part": round(rough_seconds, 1)},
        "requests": {"calm": peace, "rough": war - peace, "again": len(asked) - war},
        "failures_made_good_by_another_run": len(passing),
        "chat_faults": Counter(row["fault"] for row in chat if row["fault"]),
        "picture_faults": Counter(row["fault"] for row in pictures if row["fault"]),
        "files": len(before),
        "files_that_differ": sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)),
        "damaged_files": [*damage, *damaged(calm), *damaged(rough)],
        "unaccounted_tasks": [*unaccounted(calm), *unaccounted(rough)],
        "files_with_a_key": leaks(folder),
        "requests_inside": sum(row["server"] == "inner" for row in asked),
        "requests_elsewhere": sum(row["server"] == "elsewhere" for row in asked),
        "untrue_rounds_kept": sum(FALSE_ROUND["answer"].encode() in content for content in after.values()),
    }


def _kind(problem: dict[str, str]) -> str:
    return problem["place"].partition("/bad/")[2].partition("/")[0] or problem["reason"]


MOST_REPEATS = 3
MUST_BE_EMPTY = ("files_that_differ", "damaged_files", "unaccounted_tasks", "files_with_a_key")
MUST_BE_ZERO = ("requests_inside", "requests_elsewhere", "untrue_rounds_kept")


def faults_of(result: dict[str, Any]) -> list[str]:
    """What a result shows that may not be."""
    return [f"{name}: {result[name]}" for name in (*MUST_BE_EMPTY, *MUST_BE_ZERO) if result[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.kills, arguments.seed)
    from kore.environment import environment

    print(json.dumps(result, indent=1, ensure_ascii=False))
    atomic_write(arguments.output, json.dumps({**result, "environment": environment()}, indent=1) + "\n")
    if wrong := faults_of(result):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
