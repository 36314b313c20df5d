"""Start the training stage in several processes."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from pydantic import BaseModel

from kore.errors import KoreError
from kore.recipes import recipe

if TYPE_CHECKING:
    from kore.pipeline.stages import TrainStage

_PR_SET_PDEATHSIG = 1


def train_in_processes(stage: TrainStage) -> None:
    """Run ``kore train`` under torchrun with the stage's ``settings.processes``; they end when this process does.

    Raises:
        KoreError: A process failed; it has said why.
    """
    processes = stage.settings.processes
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(processes), "-m", "kore"]
    finished = subprocess.run([*launcher, *train_command(stage)], preexec_fn=_end_with_parent)
    if finished.returncode != 0:
        raise KoreError(
            f"train: one of the {processes} training processes failed (status {finished.returncode}); "
            "its message is above"
        )


def train_command(stage: TrainStage) -> list[str]:
    """The ``kore train`` command line that does the work of a stage."""
    model, new = stage.model, stage.new
    command = ["train", "--model", model.path, "--dtype", model.dtype, "--device", model.device]
    command += ["--output", str(stage.output), "--seed", str(stage.seed), "--format", new.format]
    command += ["--on-bad-row", new.on_bad_row]
    command += ["--full"] if stage.init is None else ["--adapter", str(stage.init)]
    if stage.in_full is not None:
        for key in ("method", "options"):
            command += ["--set", f"adapter.{key}={_yaml(getattr(stage.in_full, key))}"]
    for file in new.files:
        command += ["--data", str(file)]
    if new.image_root is not None:
        command += ["--image-root", str(new.image_root)]
    if new.max_samples is not None:
        command += ["--set", f"new.max_samples={new.max_samples}"]
    if stage.old is not None:
        for file in stage.old.files:
            command += ["--old", str(file)]
        for key, value in stage.old.model_dump(mode="json", exclude={"files"}).items():
            if value is not None:
                command += ["--set", f"old.{key}={_yaml(value)}"]
    if stage.recipe is not None:
        command += ["--recipe", stage.recipe]
    sections: dict[str, BaseModel] = {"train": stage.settings.settings()}
    if stage.protection.strength is not None:
        command += ["--protect", str(stage.covariance), "--protect-gradients", str(stage.gradients)]
        sections["protection"] = stage.protection
    elif stage.covariance is not None and stage.holds_covariance:
        command += ["--covariance", str(stage.covariance)]
    for section, settings in sections.items():
        expected = (
            type(settings)
            .model_validate(dict(recipe(stage.recipe or "default").section(section)))
            .model_dump(mode="json")
        )
        for key, value in settings.model_dump(mode="json").items():
            if value != expected[key]:
                command += ["--set", f"{section}.{key}={_yaml(value)}"]
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
