"""Start the training stage in several processes."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

from kore.errors import KoreError
from kore.pipeline.config import DataSection, ModelSection, TrainSection

_PR_SET_PDEATHSIG = 1


def train_in_processes(
    model: ModelSection, new: DataSection, settings: TrainSection, init: Path | None, output: Path, seed: int
) -> None:
    """Run ``kore train`` under torchrun with ``settings.processes`` processes; they end when this process does.

    Raises:
        KoreError: A process failed; it has said why.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(settings.processes), "-m", "kore"]
    command = train_command(model, new, settings, init, output, seed)
    finished = subprocess.run([*launcher, *command], preexec_fn=_end_with_parent)
    if finished.returncode != 0:
        raise KoreError(
            f"train: one of the {settings.processes} training processes failed (status {finished.returncode}); "
            "its message is above"
        )


def train_command(
    model: ModelSection, new: DataSection, settings: TrainSection, init: Path | None, output: Path, seed: int
) -> list[str]:
    """The ``kore train`` command line that does the work of these sections."""
    command = ["train", "--model", model.path, "--dtype", model.dtype, "--device", model.device]
    command += ["--output", str(output), "--seed", str(seed), "--format", new.format]
    command += ["--on-bad-row", new.on_bad_row]
    command += ["--full"] if init is None else ["--adapter", str(init)]
    for file in new.files:
        command += ["--data", str(file)]
    if new.image_root is not None:
        command += ["--image-root", str(new.image_root)]
    if new.max_samples is not None:
        command += ["--set", f"new.max_samples={new.max_samples}"]
    for name, value in settings.settings().model_dump(mode="json", exclude_defaults=True).items():
        command += ["--set", f"train.{name}={_yaml(value)}"]
    return command


def _yaml(value: object) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()


def _end_with_parent() -> None:
    """Ask the kernel to stop the launcher when this program is killed (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return
