"""Several processes that capture together."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from kore.capture import capture_covariance
from kore.capture.input_groups import agree
from kore.covariance import Group, load_covariance
from kore.errors import KoreError
from tests.batches import MODELS, make_batches
from tests.capture_worker import Whole, mixed_batches, mixed_targets, whole_batches, work
from tests.processes import run_processes


def launch(output: Path, *cases: str, count: int = 2) -> list[int | None]:
    """Run the cases in several processes; returns how they ended."""
    store = output / f"store-{cases[0]}"
    return run_processes(work, [(rank, count, store, output, cases) for rank in range(count)])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    assert launch(folder, "whole", "llava", "idle", "windows", "fails", "alone", "killed") == [-signal.SIGKILL] * 2
    return folder


def pair(folder: Path, case: str):
    first, second = (load_covariance(folder / f"{case}-{rank}") for rank in range(2))
    assert first.groups == second.groups and first.fingerprint == second.fingerprint
    for name in first.modules:
        assert torch.equal(first[name], second[name]), name
    return first


def test_whole_numbers_add_up_to_the_very_bits_of_one_process(results):
    torch.manual_seed(0)
    one = capture_covariance(Whole(), whole_batches(5), progress=False, distributed=False)
    two = pair(results, "whole")
    assert two.groups == one.groups and len(one.groups) == 2
    assert all(torch.equal(two[name], one[name]) for name in one.modules)


@pytest.mark.parametrize("case", ["llava", "idle", "windows"])
def test_processes_with_different_data_equal_one_with_all_of_it(results, case):
    model = MODELS["llava"]()
    data, targets = {
        "llava": (make_batches("llava", 5), None),
        "idle": (make_batches("llava", 3), None),
        "windows": (mixed_batches(), mixed_targets(model)),
    }[case]
    one = capture_covariance(model, data, targets, progress=False, dtype=torch.float64)
    two = pair(results, case)
    assert two.groups == one.groups
    for name in one.modules:
        scale = float(one[name].diagonal().max())
        torch.testing.assert_close(two[name].double(), one[name], rtol=0, atol=2e-6 * scale)


def test_sums_over_processes_are_rounded_once_and_only_in_their_triangle(tmp_path):
    assert launch(tmp_path, "small", count=3) == [0, 0, 0]
    for rank in range(3):
        one = 1 + 2.0**-23
        expected = torch.tensor([[rank, rank], [one, rank], [one, one]])
        assert torch.equal(torch.load(tmp_path / f"small-{rank}"), expected)


def test_windows_are_the_same_in_all_processes(results):
    folders = [sorted(p.name for p in (results / "windows").glob(f"process-0000{rank}/*")) for rank in range(2)]
    assert folders[0] == folders[1] and "window-001" in folders[0]


def test_a_failure_in_one_process_ends_them_all(results):
    own, other = ((results / f"error-{rank}").read_text() for rank in (1, 0))
    assert "process" not in own and other == f"process 1 of the capture failed: {own}"


def test_distributed_false_is_for_each_process_alone(results):
    for rank in range(2):
        one = capture_covariance(MODELS["llava"](), make_batches("llava", 1 + rank), progress=False)
        alone = load_covariance(results / f"alone-{rank}")
        assert alone.groups == one.groups and all(torch.equal(alone[name], one[name]) for name in one.modules)


def test_killed_processes_continue_from_their_own_checkpoints(results):
    assert len(list((results / "checkpoint").glob("process-*/manifest.json"))) == 2
    assert launch(results, "continued") == [0, 0]
    one = capture_covariance(MODELS["llava"](), make_batches("llava", 6), progress=False)
    two = pair(results, "continued")
    assert two.groups == one.groups
    for name in one.modules:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6 * float(one[name].diagonal().max()))
    with pytest.raises(KoreError, match="another processes"):
        folder = results / "checkpoint" / "process-00000"
        capture_covariance(MODELS["llava"](), make_batches("llava", 6), checkpoint=folder, checkpoint_every=1)


def test_groups_of_processes_that_lack_some_or_differ():
    ab, c = Group("a", ("a", "b"), 4, 7), Group("c", ("c",), 4, 2)
    assert agree([[ab], [], [c, ab]]) == [Group("a", ("a", "b"), 4, 14), c]
    with pytest.raises(KoreError, match=r"b: process 1 found other layers that read its input .* share_inputs=False"):
        agree([[ab], [Group("b", ("b",), 4, 1)]])


def test_a_group_needs_torch_distributed():
    with pytest.raises(KoreError, match="init_process_group"):
        capture_covariance(MODELS["llama"](), make_batches("llama", 1), distributed=True)
