"""Several processes that make one adapter together, and what a killed one leaves behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from kore.adapter import KoreConfig, get_kore_model, save_adapter
from kore.adapter.compute import Job, share_out
from kore.capture import capture_covariance
from kore.covariance import load_covariance, merge_covariance
from kore.errors import ArtifactError, KoreError
from tests.adapter_worker import CONFIGS, work
from tests.batches import MODELS, make_batches
from tests.processes import run_processes

FILES = ("adapter_config.json", "adapter_model.safetensors", "kore.json")


def launch(folder: Path, *cases: str) -> list[int | None]:
    """Run the cases in two processes; returns how they ended."""
    store = folder / f"store-{cases[0]}"
    return run_processes(work, [(rank, 2, store, folder, cases) for rank in range(2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    capture_covariance(MODELS["llava"](), make_batches("llava", 4), progress=False).save(folder / "covariance")
    assert launch(folder, *CONFIGS, "fails", "alone", "killed") == [-signal.SIGKILL] * 2
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """The adapters that one process makes, with as many threads as each of the two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cov = load_covariance(folder / "covariance")
    for name, config in CONFIGS.items():
        save_adapter(get_kore_model(MODELS["llava"](), cov, config, progress=False), folder / "one" / name)
    torch.set_num_threads(threads)
    return folder / "one"


def assert_same_files(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_ends_with_the_adapter_that_one_makes(folder, single, case, rank):
    assert_same_files(folder / f"{case}-{rank}", single / case)


def test_distributed_false_is_for_each_process_alone(folder, single):
    for rank in range(2):
        assert_same_files(folder / f"alone-{rank}", single / "rank")


def test_a_failure_in_one_process_ends_them_all(folder):
    own, other = ((folder / f"error-fails-{rank}").read_text() for rank in (1, 0))
    assert "holds NaN" in own and other == f"process 1 of the initialisation failed: {own}"


def test_killed_processes_go_on_and_end_with_the_same_adapter(folder, single):
    cov = load_covariance(folder / "covariance")
    assert len(list((folder / "parts").glob("part-*/manifest.json"))) == 2
    assert [(folder / f"solved-{rank}").read_text() for rank in range(2)] == [".", "."]
    assert launch(folder, "continued") == [0, 0]
    assert sum(len((folder / f"solved-{rank}").read_text()) for rank in range(2)) == len(cov.groups)
    for rank in range(2):
        assert_same_files(folder / f"continued-{rank}", single / "rank")


def test_parts_of_something_else_are_refused(folder, tmp_path):
    cov, model = load_covariance(folder / "covariance"), MODELS["llava"]
    get_kore_model(model(), cov, KoreConfig(rank=3), progress=False, checkpoint=tmp_path / "parts")
    twice = merge_covariance([cov, cov])
    for other, config, what in ((cov, KoreConfig(rank=4), "configuration"), (twice, KoreConfig(rank=3), "covariance")):
        with pytest.raises(KoreError, match=rf"part-00000: was made with another {what}; delete .*parts to start"):
            get_kore_model(model(), other, config, progress=False, checkpoint=tmp_path / "parts")
    file = tmp_path / "parts" / "part-00001" / "factors.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ArtifactError, match=r"part-00001.*corrupt"):
        get_kore_model(model(), cov, KoreConfig(rank=3), progress=False, checkpoint=tmp_path / "parts")


def test_sharded_weights_are_gathered(folder, single):
    from kore.artifacts import load_tensors

    assert launch(folder, "sharded") == [0, 0]
    expected = load_tensors(single / "rank" / "adapter_model.safetensors")
    for rank in range(2):
        found = torch.load(folder / f"sharded-{rank}.pt")
        assert len(found) == 14
        for name, factor in found.items():
            assert torch.equal(factor, expected[name.replace(".default", "")]), name


def test_the_costliest_inputs_are_shared_out_first():
    jobs = [Job(index, (f"layer {index}",), dim) for index, dim in enumerate((10, 40, 10, 39, 30, 10))]
    plans = [[job.dim for job in plan] for plan in share_out(jobs, 2)]
    assert plans == [[40, 10, 10, 10], [39, 30]]
    assert [job.index for job in share_out(jobs, 1)[0]] == list(range(6))
    assert share_out(jobs[:1], 3) == [jobs[:1], [], []]
