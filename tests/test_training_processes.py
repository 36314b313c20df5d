"""Training runs in processes of their own: killed and started again, and two at once under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kore.data import load_conversations
from kore.training import train
from kore.training.checkpoints import newest_complete
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import penalty, prepared

REPOSITORY = Path(__file__).parents[1]
CONFIG = dict(batch_size=2, epochs=3, learning_rate=5e-3, logging_steps=1, save_steps=5, report_to=[], progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    save_tiny("llava", root / "llava")
    tiny_conversations(root / "data", 6)
    tiny_conversations(root / "text", 6, text_only=True)
    return root


def worker(root: Path, output: Path, processes: int = 1, method: str = "random-a", **options) -> int:
    arguments = ["-m", "tests.training_worker", str(root), str(output)]
    arguments.append(json.dumps({"kind": "llava", "method": method, "config": CONFIG, **options}))
    if processes > 1:
        arguments = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    # A session of its own, so that a run that hangs is ended with all its processes.
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{command} hangs") from None
    if process.returncode > 0:
        raise AssertionError(errors[-4000:])
    return process.returncode


def here(root: Path, output: Path, method: str = "random-a", strength: float | None = None, **changes):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, encoder = prepared("llava", root, method)
        data = load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")
        data += load_conversations(root / "text" / "conversations.json")
        protection = None if strength is None else penalty(model, encoder, data, strength)
        return train(model, encoder, data, {**CONFIG, **changes}, output, penalty=protection)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_run_killed_while_it_writes_a_checkpoint_ends_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    """18 steps, checkpoints at 5, 10, 15; SIGKILL in the middle of writing the one at 10."""
    whole = here(root, tmp_path / "whole")
    cut = tmp_path / "cut"
    assert worker(root, cut, kill_at=10) == -signal.SIGKILL
    assert (cut / "checkpoint-10").is_dir() and newest_complete(cut) == cut / "checkpoint-5"
    assert not (cut / "adapter").exists() and not (cut / "history.json").exists()
    resumed = here(root, cut)
    assert resumed.history == whole.history
    tensors, expected = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (cut, tmp_path / "whole")
    )
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    frozen = [parameter for name, parameter in resumed.model.named_parameters() if "lora_A" in name]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_interrupted_run_ends_as_if_it_had_not_been(root: Path, tmp_path: Path, method: str, monkeypatch) -> None:
    from kore.training.trainer import KoreTrainer

    whole = here(root, tmp_path / "whole", method)

    def interrupt(self, output_dir: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = KoreTrainer._save_optimizer_and_scheduler
        patch.setattr(
            KoreTrainer,
            "_save_optimizer_and_scheduler",
            lambda self, directory: (interrupt if self.state.global_step == 15 else save)(self, directory),
        )
        with pytest.raises(KeyboardInterrupt):
            here(root, tmp_path / "cut", method)
    assert newest_complete(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-10"
    resumed = here(root, tmp_path / "cut", method)
    assert resumed.history == whole.history
    for (name, one), (_, two) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_checkpoint_that_lost_a_byte_does_not_count(root: Path, tmp_path: Path) -> None:
    here(root, tmp_path, save_total_limit=3)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-18"
    state = tmp_path / "checkpoint-18" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-15"
    (tmp_path / "checkpoint-15" / "adapter_model.safetensors").unlink()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.slow
def test_two_processes_agree_and_equal_one_with_the_double_batch(root: Path, tmp_path: Path) -> None:
    """Images and text-only rows in one run, so that a process may hold a batch without any image.

    Plain gradient descent, since Adam turns rounding differences of small gradients into whole steps. The bounds leave
    room for sums in another order; another mean, batch or learning rate is off by more than a hundredth.
    """
    descent = dict(optimizer="sgd", learning_rate=5.0, projector_learning_rate=0.5)
    assert worker(root, tmp_path / "two", processes=2, config={**CONFIG, **descent}) == 0
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() and any("lora_B" in name for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    one = here(root, tmp_path / "one", batch_size=4, **descent)
    history = json.loads((tmp_path / "two" / "history.json").read_text())
    assert len(history) == len(one.history) == 9
    for entry, reference in zip(history, one.history, strict=True):
        assert entry["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(reference["grad_norm"], rel=3e-3)
    assert all(value.abs().max() > 1e-4 for name, value in first.items() if "lora_B" in name)
    for name, parameter in one.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_penalty_as_one_has_it(root: Path, tmp_path: Path) -> None:
    """Two processes with two passes to a step take the steps of one process with the whole batch, penalty included."""
    descent = dict(optimizer="sgd", learning_rate=5.0, projector_learning_rate=0.5, epochs=2, save_steps=None)
    config = {**CONFIG, **descent, "batch_size": 1, "gradient_accumulation": 2}
    assert worker(root, tmp_path / "two", processes=2, config=config, strength=300.0) == 0
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    one = here(root, tmp_path / "one", strength=300.0, batch_size=4, **descent)
    history = json.loads((tmp_path / "two" / "history.json").read_text())
    assert len(history) == len(one.history) == 6 and history[-1]["penalty"] > 1e-2
    for entry, reference in zip(history, one.history, strict=True):
        for value in ("loss", "penalty"):
            assert entry[value] == pytest.approx(reference[value], rel=1e-3, abs=1e-7)
    for name, parameter in one.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-3, atol=1e-5)
