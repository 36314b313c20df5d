"""Everything that only a GPU can show, in one command: correctness first, then times, in one JSON file.

    python -m benchmarks.gpu_suite                       # under 8 minutes on one H200
    python -m benchmarks.gpu_suite --backend native      # the compiled kernels instead of Triton's
    python -m benchmarks.gpu_suite --only correctness "lora correctness"; python -m benchmarks.gpu_suite --add --only …
    python -m benchmarks.gpu_suite --device cpu --quick  # the same code on tiny shapes

Exit status: 0, everything asked for was checked and is right; 1, something is wrong or was not reached in time; 2, no
GPU. The file is written after every section and holds what was reached, whatever happens. ``--add`` adds to a file of
the same code and machine, so that a run can be made in portions.

To add a section: write ``def section(suite: Suite) -> dict`` that stops at ``suite.deadline``, calls ``suite.fail`` for
what is wrong and ``suite.miss`` for what it did not reach, and returns what is to be stored; put it into ``SECTIONS``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kore_kernels as kk
from benchmarks import gpu_covariance, gpu_init, gpu_init_times, gpu_lora, gpu_model, gpu_sanitizers, gpu_step
from kore.artifacts import read_json
from kore.bench.machine import Roofline, describe, resolve_device
from kore.bench.show import write_json
from kore.bench.timing import Clock
from kore.environment import environment

RESULTS = Path(__file__).parent / "results"
OUTPUT = {"triton": RESULTS / "gpu.json", "native": RESULTS / "gpu_native.json"}
SCHEMA = 1


@dataclass
class Suite:
    """What the sections share.

    Attributes:
        device: Where everything runs.
        quick: Tiny shapes, for tests on a CPU.
        output: The JSON file.
        end: When the whole suite must be over, by time.monotonic.
        deadline: When the running section must be over.
        clock: Times calls on the device.
        roofline: Set by the first section.
        wrong: One line for everything that is wrong.
        missed: One line for everything that was not reached in time.
        result: What is written.
        clean: Of every section that ran, whether it found nothing wrong.
        tested: The backend under test on a GPU.
    """

    device: torch.device
    quick: bool
    output: Path
    end: float
    clock: Clock
    deadline: float = 0.0
    roofline: Roofline | None = None
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    clean: dict[str, bool] = field(default_factory=dict)
    tested: str = "triton"

    @property
    def backend(self) -> str:
        """The backend under test."""
        return self.tested if self.device.type == "cuda" else "native"

    def left(self) -> float:
        """Seconds until the deadline of the running section."""
        return self.deadline - time.monotonic()

    def fail(self, line: str) -> None:
        self.wrong.append(line)
        print(f"WRONG: {line}", flush=True)

    def miss(self, line: str) -> None:
        self.missed.append(line)
        print(f"NOT REACHED: {line}", flush=True)

    def save(self) -> None:
        write_json(self.output, {**self.result, "wrong": self.wrong, "missed": self.missed})

    def give_up(self) -> None:
        """End the process at once, with what there is: something does not come back."""
        self.miss("the end of the running section")
        self.save()
        os._exit(1)


@dataclass(frozen=True)
class Section:
    """``share`` of the time that is left, beside those of the sections after it; ``needs`` one that found no fault."""

    name: str
    run: Callable[[Suite], dict[str, Any]]
    share: float
    needs: str | None = None


SECTIONS = (
    Section("roofline", gpu_covariance.roofline, 20),
    Section("correctness", gpu_covariance.correctness, 90),
    Section("lora correctness", gpu_lora.correctness, 80),
    Section("covariance", gpu_covariance.times, 80, needs="correctness"),
    Section("lora", gpu_lora.times, 75, needs="lora correctness"),
    Section("model", gpu_model.section, 55, needs="correctness"),
    Section("training step", gpu_step.section, 60, needs="lora correctness"),
    Section("init correctness", gpu_init.correctness, 25),
    Section("init", gpu_init_times.section, 120, needs="init correctness"),
    Section("sanitizers", gpu_sanitizers.section, 60),
)


def go_on(suite: Suite) -> None:
    """Take over what an earlier run left in the file.

    Raises:
        SystemExit: It was made by other code, on another machine or with other shapes.
    """
    earlier, own = read_json(suite.output), json.loads(json.dumps(suite.result))
    for key in ("schema", "environment", "machine", "backend", "quick"):
        if earlier.get(key) != own[key]:
            raise SystemExit(
                f"{suite.output}: its {key} is {earlier.get(key)}, and this run's {own[key]}: "
                "give another --output, or leave out --add to write the file anew"
            )
    suite.wrong, suite.missed = earlier.pop("wrong"), earlier.pop("missed")
    suite.result = earlier
    suite.clean = {section.name: not suite.wrong for section in SECTIONS if section.name in earlier}


def run(suite: Suite, names: list[str], commit: str | None, add: bool = False) -> int:
    """Run the named sections; returns the exit status. Raises SystemExit as :func:`go_on`."""
    facts = environment()
    suite.result = {
        "schema": SCHEMA,
        "environment": {**facts, "commit": commit or facts["commit"]},
        "machine": describe(suite.device),
        "backends": {name: str(info) for name, info in kk.backends().items()},
        "backend": suite.backend,
        "quick": suite.quick,
        "seconds": {},
    }
    if add and suite.output.exists():
        go_on(suite)
    suite.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    chosen = [section for section in SECTIONS if section.name in names]
    for index, section in enumerate(chosen):
        if section.needs and not suite.clean.get(section.needs, True):
            suite.fail(f"{section.name}: not run, because {section.needs} found something wrong")
            continue
        started, faults = time.monotonic(), len(suite.wrong)
        shares = sum(each.share for each in chosen[index:])
        suite.deadline = started + (suite.end - started) * section.share / shares
        print(f"== {section.name}, {suite.left():.0f} s at most", flush=True)
        try:
            suite.result[section.name] = section.run(suite)
        except Exception as error:
            traceback.print_exc()
            suite.fail(f"{section.name}: {gpu_covariance.one_line(error)}")
        suite.clean[section.name] = len(suite.wrong) == faults
        suite.result["seconds"][section.name] = round(time.monotonic() - started, 1)
        if suite.device.type == "cuda":
            torch.cuda.empty_cache()
        suite.save()
    suite.save()
    print(f"{suite.output}: {len(suite.wrong)} wrong, {len(suite.missed)} not reached in time", flush=True)
    for line in (*suite.wrong, *suite.missed):
        print(line)
    return 1 if suite.wrong or suite.missed else 0


def main() -> int:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which the suite ends")
    parser.add_argument("--backend", choices=list(OUTPUT), default="triton", help="the one under test on a GPU")
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT['triton']}, of native {OUTPUT['native'].name}")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these sections")
    parser.add_argument("--add", action="store_true", help="keep the other sections that the file holds")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so nothing was measured. --device cpu --quick tries the suite itself.")
        return 2
    device = resolve_device(arguments.device)
    if device.type == "cpu" and not arguments.quick:
        parser.error("--device cpu is for trying the suite: add --quick")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    end = time.monotonic() + arguments.budget
    output = arguments.output or OUTPUT[arguments.backend]
    suite = Suite(device, arguments.quick, output, end, Clock(device), tested=arguments.backend)
    guard = threading.Timer(arguments.budget + 15, suite.give_up)
    guard.daemon = True
    guard.start()
    try:
        return run(suite, arguments.only, arguments.commit, arguments.add)
    finally:
        guard.cancel()
        guard.join()


if __name__ == "__main__":
    raise SystemExit(main())
