"""``kore capture`` and ``kore init`` under torchrun: two processes, one result; killed and gone on."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from kore.cli.main import main
from kore.covariance import load_covariance
from tests.cli_worker import run
from tests.processes import torchrun
from tests.tiny import save_tiny, tiny_conversations

pytestmark = pytest.mark.slow

FILES = ("adapter_config.json", "adapter_model.safetensors", "kore.json")


def spawned(log: Path, *words: str, **environment: str) -> list[int | None]:
    """The same with torchrun's variables in two processes, without its launcher; how they ended."""
    context = multiprocessing.get_context("spawn")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), **agent, **environment}
    workers = []
    for rank in ("0", "1"):
        settings = {**common, "RANK": rank, "LOCAL_RANK": rank}
        workers.append(context.Process(target=run, args=(words, settings, f"{log}-{rank}"), daemon=True))
        workers[-1].start()
    for worker in workers:
        worker.join(timeout=60)
        worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, old data in two files, and what one process makes of them with one thread."""
    folder = tmp_path_factory.mktemp("together")
    save_tiny("llama", folder / "model")
    for name, count in (("a", 5), ("b", 3)):
        tiny_conversations(folder / name, count, text_only=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(capture(folder, folder / "cov")) == 0
    assert main(init(folder, folder / "one")) == 0
    torch.set_num_threads(threads)
    return folder


def capture(work: Path, output: Path) -> list[str]:
    data = [word for name in ("a", "b") for word in ("-d", f"{work}/{name}/conversations.json")]
    return ["capture", "-m", f"{work}/model", *data, "-o", str(output), "--device", "cpu", "--batch-size", "2"]


def init(work: Path, output: Path) -> list[str]:
    return ["init", "-m", f"{work}/model", "-c", f"{work}/cov", "-o", str(output), "--device", "cpu", "--rank", "4"]


def test_init_killed_in_both_processes_goes_on_and_gives_the_file_of_one(work, tmp_path):
    output = tmp_path / "init"
    killed = spawned(tmp_path / "log", *init(work, output), KORE_TEST_DIES="after a part")
    assert killed == [-signal.SIGKILL] * 2 and not (output / FILES[0]).exists()
    assert len(list((output / "checkpoint").glob("part-*/manifest.json"))) == 2
    ended = torchrun("tests.cli_worker", *init(work, output), KORE_TEST_LOG=str(tmp_path / "solved"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("goes on where it was stopped") == ended.stdout.count("result: ") == 1
    solved = [(tmp_path / f"solved-{rank}").read_text().count(".") for rank in range(2)]
    assert min(solved) > 0 and sum(solved) == len(load_covariance(work / "cov").groups) - 2
    for name in FILES:
        assert (output / name).read_bytes() == (work / "one" / name).read_bytes(), name
    assert {file.name for file in output.iterdir()} == {file.name for file in (work / "one").iterdir()}


def test_capture_gives_the_sums_of_one_process(work, tmp_path):
    assert spawned(tmp_path / "log", *capture(work, tmp_path / "cov")) == [0, 0], (tmp_path / "log-0").read_text()
    said = (tmp_path / "log-0").read_text()
    assert "8 samples" in said and "2 groups of data balanced" in said
    assert "samples" not in (tmp_path / "log-1").read_text()
    one, two = load_covariance(work / "cov"), load_covariance(tmp_path / "cov")
    assert one.groups == two.groups and one.merged_from == two.merged_from
    for group in one.groups:
        torch.testing.assert_close(
            two[group.name], one[group.name], rtol=1e-4, atol=1e-6 * float(one[group.name].max())
        )
    assert not list((tmp_path / "cov").rglob("checkpoint*"))
