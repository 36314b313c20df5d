"""`kore reproduce` from end to end on toy schedules, killed and gone on with; `--scale paper` without data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from kore.cli.main import main
from kore.pipeline.loading import load_config
from kore.reproduce import run as module
from kore.reproduce.cell import CELL, Budget, finished, run
from kore.reproduce.cell import Job as CellJob
from kore.reproduce.inputs import conversations
from kore.reproduce.paper import MODELS, configuration, missing_files, paper_rows, run_paper
from kore.reproduce.prepare import Sizes
from kore.reproduce.settings import Setting
from kore.reproduce.studies import BY_ID, GENERAL, KORE, LLAVA, Row
from kore.reproduce.tasks import Task, run_tasks
from kore.reproduce.worlds import Plan, make_world
from tests.test_reproduce_worlds import TINY

FEW = Sizes(things=2, rounds=1, per_fact=1, per_task=1, per_group=4)
TWO = tuple(BY_ID[f"{LLAVA}/{name}"] for name in ("lora-plain", KORE))


def tiny(directory: Path, rows: tuple[Row, ...] = TWO, quick: bool = True) -> module.Reproduction:
    return module.Reproduction(
        directory, rows, (1,), Budget(2, 2), quick, plan=lambda name, world, home: Plan(name, world, home, TINY, FEW)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[module.Reproduction, dict, list[str]]:
    """A reproduction of two rows, in threads of this process."""
    work, said = tiny(tmp_path_factory.mktemp("mini")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "workers", lambda processes: ThreadPoolExecutor(1))
        values = module.reproduce(work, said.append, 1)
    return work, values, said


@pytest.mark.slow
def test_a_reproduction_writes_cells_tables_observations_and_a_page(made) -> None:
    work, values, said = made
    assert set(values["cells"]) == {row.id for row in TWO}
    for row in TWO:
        cell = json.loads((work.cell_folder(row, 1) / CELL).read_text())
        assert cell["trainable"] > 0 and cell["history"] and cell["core_seconds"]["train"] > 0
        assert len(conversations(work.plans[LLAVA, 1].prepare().plain)) == cell["conversations"]
        assert not (work.cell_folder(row, 1) / "train").exists()
    tables = {file.name for file in (work.directory / "tables").iterdir()}
    assert {"main.csv", "main.json", "observations.json"} <= tables
    assert values["failures"] == {} and len(values["observations"]) == 13
    page = (work.directory / "report.html").read_text()
    assert page.count("<svg") >= 3 and "data:image/" in page and "What differs from the paper" in page
    assert 'src="http' not in page and "Case study" in page
    assert said[-1].startswith("report:") and sum("left" in line for line in said) == 4


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_what_has_changed_is(made) -> None:
    work, _, _ = made
    row = TWO[0]
    world = work.plans[LLAVA, 1].prepare()
    job = CellJob(row, world, Setting(3), work.cell_folder(row, 1), budget=work.budget)
    assert finished(job) is None
    from kore.reproduce.settings import setting_of

    same = CellJob(row, world, setting_of(row), job.directory, budget=work.budget)
    before = (job.directory / CELL).stat().st_mtime_ns
    assert run(same) == finished(same) != {}
    assert (job.directory / CELL).stat().st_mtime_ns == before
    (job.directory / CELL).write_text("{")
    assert finished(same) is None
    again = run(same)
    assert finished(same)["ka"] == again["ka"]
    assert all(task.done for task in work.tasks())


@pytest.mark.slow
def test_general_augmentations_are_as_many_conversations_and_the_first_is_the_original(made) -> None:
    from kore.reproduce.inputs import data_file, write_general

    work, _, _ = made
    world = work.plans[LLAVA, 1].prepare()
    write_general(world)
    plain = {one.messages[1].text for one in conversations(world.plain)}
    for kind in GENERAL:
        talks = conversations(data_file(world, kind))
        assert len(talks) == len(conversations(world.augmented))
        texts = [one.messages[1].text for one in talks]
        assert (set(texts) == plain) == (kind != "text-agnostic")
        pictures = {Path(one.images[0]).read_bytes() for one in talks}
        assert (len(pictures) > 2 * len(plain)) == kind.startswith("image")
        assert {one.messages[0].text for one in talks} == {one.messages[0].text for one in conversations(world.plain)}


def test_scale_paper_writes_valid_configurations_and_says_what_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    found = run_paper(tmp_path / "out", tmp_path / "data", said.append)
    assert len(found) == len(list(paper_rows())) == len(said) - 1
    assert all(found.values())
    for name in found:
        load_config(tmp_path / "out" / "configurations" / f"{name}.yaml", check_paths=False)
    values = yaml.safe_load((tmp_path / "out/configurations/llava-1.5-7b/kore.yaml").read_text())
    assert values["recipe"] == "paper" and values["adapter"] == {"method": "kore", "rank": "match-lora-128"}
    assert {model.name for model, _ in paper_rows()} == {model.name for model in MODELS}
    row = BY_ID[f"{LLAVA}/{KORE}"]
    for path in missing_files(configuration(MODELS[0], row, tmp_path / "data", tmp_path / "run")):
        file = Path(path)
        file.mkdir(parents=True) if file.suffix == "" else (
            file.parent.mkdir(parents=True, exist_ok=True),
            file.touch(),
        )
    assert run_paper(tmp_path / "out", tmp_path / "data", said.append, ["llava-1.5-7b/kore"], check=True) == {
        "llava-1.5-7b/kore": []
    }
    assert any(line == "llava-1.5-7b/kore: ready" for line in said)


def test_options_of_one_scale_are_refused_for_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "out")]
    for words, expected in (
        (["--scale", "paper", "--quick"], "--quick is for --scale mini"),
        (["--scale", "paper", "--tune"], "--tune is for --scale mini"),
        (["--check"], "--check is for --scale paper"),
        (["--tune", "--quick"], "expected without --quick"),
        (["--rows", "lora"], "expected names out of"),
    ):
        assert main(["reproduce", *out, *words]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_reproduction_goes_on_with_the_cells_that_are_left(tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.test_reproduce_run import tiny\n"
        "from kore.reproduce.run import reproduce\n"
        "if __name__ == '__main__':\n"
        "    reproduce(tiny(Path(sys.argv[1]), quick=False), lambda text: print(text, flush=True), 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "out")]
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    cell = tiny(tmp_path / "out").cell_folder(TWO[0], 1) / CELL
    _wait(cell.is_file)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    stamp = cell.stat().st_mtime_ns
    assert not (tmp_path / "out" / "results.json").exists()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout + second.stderr
    assert cell.stat().st_mtime_ns == stamp
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(values["cells"]) == {row.id for row in TWO}
    found = values["before"][LLAVA]["1"]["findings"]
    assert set(found["reconstruction"]) == {"svd", "asvd", "co-svd"}
    assert len(found["similarity"]["matrix"]) == len(found["similarity"]["tasks"]) == 14
    assert 0 < found["similarity"]["across"] <= 1
    assert "Two findings" in (tmp_path / "out" / "report.html").read_text()


def _wait(there: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_plan_travels_as_a_task(tmp_path: Path) -> None:
    plan = Plan(LLAVA, 1, tmp_path, TINY, FEW)
    outcome = run_tasks([Task("world", make_world, (plan,))], ThreadPoolExecutor(1), 1, lambda _: None)
    assert outcome.failures == {} and outcome.results["world"].checkpoint.is_dir()
