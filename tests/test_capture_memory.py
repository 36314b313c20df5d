"""Where the matrices live, what the plan says, and how a budget is kept."""

from __future__ import annotations

import functools
import gc
import re
from pathlib import Path

import pytest
import torch

from kore.capture import MemoryPlan, capture_covariance, plan_capture
from kore.capture.accumulator import Accumulator
from kore.capture.plan import PlannedGroup, make_plan
from kore.capture.rows import Rows
from kore.capture.storage import Storage
from kore.errors import KoreError
from kore.sizes import format_bytes, parse_bytes
from tests.batches import MODELS, make_batch, make_batches

GIB = 1024**3
capture = functools.partial(capture_covariance, progress=False)


def llava_7b(device: str = "cuda:0") -> list[PlannedGroup]:
    groups = []
    for layer in range(32):
        for modules, dim in ((("q_proj", "k_proj", "v_proj"), 4096), (("o_proj",), 4096), (("gate_proj",), 4096)):
            groups.append(PlannedGroup(tuple(f"layers.{layer}.{m}" for m in modules), dim, device, 2))
        groups.append(PlannedGroup((f"layers.{layer}.down_proj",), 11008, device, 2))
    return groups


def plan(budget: int | None, storage: str = "auto", again: bool = True, device: str = "cuda:0") -> MemoryPlan:
    return make_plan(llava_7b(device), storage, torch.float32, 2048, budget, again)


def test_the_plan_of_a_7b_model():
    packed, square = plan(None), plan(None, "square")
    buffers = 2048 * 2 * 32 * (3 * 4096 + 11008)
    matrices = 4 * (48 * 4097 * 4096 + 16 * 11009 * 11008)
    assert packed.storage == "packed" and packed.peak() == {"cuda:0": matrices + buffers}
    assert square.peak() == {"cuda:0": 4 * 32 * (3 * 4096**2 + 11008**2) + buffers}
    assert 1.9 < (square.peak()["cuda:0"] - buffers) / matrices < 2.0
    assert len(packed.windows) == 1 and packed.on_disk() == 0


@pytest.mark.parametrize("budget", [14 * GIB, 12 * GIB, 6 * GIB, GIB])
def test_windows_are_as_few_as_fit_and_hold_every_group_once_in_order(budget):
    chosen = plan(budget)
    assert [index for window in chosen.windows for index in window] == list(range(128))
    assert chosen.peak()["cuda:0"] <= budget
    for window, later in zip(chosen.windows, chosen.windows[1:]):
        assert chosen.excess([chosen.groups[i] for i in (*window, later[0])]) == "cuda:0"
    assert (len(chosen.windows) == 1) == (budget == 14 * GIB)


def test_batches_that_come_once_send_the_matrices_of_a_gpu_to_the_host():
    chosen = plan(6 * GIB, again=False)
    assert chosen.storage == "offload" and len(chosen.windows) == 1
    assert chosen.peak()["cuda:0"] <= 6 * GIB < chosen.peak()["cpu"]
    with pytest.raises(KoreError, match=r"one pass needs 13\.\d GiB on cpu, 6\.0 GiB are allowed; several passes need"):
        plan(6 * GIB, again=False, device="cpu")
    with pytest.raises(KoreError, match="several passes need batches that can be iterated again"):
        plan(GIB, again=False)


def test_a_budget_below_one_matrix_names_it_and_what_it_needs():
    with pytest.raises(
        KoreError, match=r"layers\.0\.down_proj alone needs 505\.\d MiB on cuda:0 .*d_in 11008.* 200\.0 MiB"
    ):
        plan(200 * 1024**2)


def test_the_text_of_a_plan():
    text = str(plan(6 * GIB))
    first = "covariance: 192 layers read 128 inputs; packed float32 matrices, 3 passes over the data"
    assert text.splitlines()[0] == first
    assert re.search(r"32 +4096 +1\.0 GiB +512\.0 MiB +cuda:0 +q_proj k_proj v_proj", text)
    assert re.search(r"cuda:0: 5\.\d GiB at most \(allowed 6\.0 GiB", text)
    assert re.search(r"disk: 10\.2 GiB", text)
    assert max(map(len, text.splitlines())) < 100


def test_plan_capture_and_the_printed_plan(capsys):
    model, batches = MODELS["llava"](), make_batches("llava", 2)
    small = plan_capture(model, batches[0], memory_budget="600KiB", buffer_rows=512, dtype=torch.float64)
    assert [len(group.modules) for group in small.groups] == [3, 1, 2, 1] * 2 and small.groups[0].itemsize == 4
    assert len(small.windows) == 2
    half = MODELS["llama"]().to(torch.bfloat16)
    for normalize, size in (("none", 2), ("official", 4)):
        assert plan_capture(half, make_batch("llama"), normalize=normalize).groups[0].itemsize == size
    one = plan_capture(model, batches[0])
    assert one.peak() == {"cpu": 4 * (3 * 49 * 48 + 81 * 80) + 2048 * 4 * (6 * 48 + 2 * 80)}
    capture_covariance(model, batches)
    assert capsys.readouterr().err.count("14 layers read 8 inputs; packed float32 matrices, one pass") == 1
    capture(model, batches)
    assert capsys.readouterr().err == ""


def test_what_has_not_run_is_planned_as_if_it_shared_nothing():
    text_only = {"input_ids": torch.randint(20, 300, (1, 6))}
    planned = plan_capture(MODELS["llava"](), text_only, targets=["linear_1", "linear_2", "q_proj", "k_proj"])
    assert [len(group.modules) for group in planned.groups][:2] == [2, 2]
    assert {group.modules[0].rpartition(".")[2] for group in planned.groups[2:]} == {
        "linear_1",
        "linear_2",
        "q_proj",
        "k_proj",
    }


@pytest.mark.parametrize("storage", ["packed", "square", "offload", "auto"])
@pytest.mark.parametrize("budget", [None, "100kb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_of_keeping_the_matrices_gives_the_same_bits(storage, budget, dtype):
    model, batches = MODELS["llava"](), make_batches("llava", 3)
    plain = capture(model, batches, storage="square", buffer_rows=50, dtype=dtype)
    cov = capture(model, batches, storage=storage, memory_budget=budget, buffer_rows=50, dtype=dtype)
    assert cov.groups == plain.groups and cov.fingerprint == plain.fingerprint
    for name in plain.modules:
        assert torch.equal(cov[name], plain[name])
        assert torch.equal(cov[name], cov[name].mT)


@pytest.mark.parametrize("kind", ["llava", "qwen_vl"])
def test_windows_keep_to_the_budget_and_give_the_same_bits(kind, monkeypatch, tmp_path):
    model, batches = MODELS[kind](), make_batches(kind, 3)
    whole = capture(model, batches, buffer_rows=16)
    placed: list[int] = []
    place = Storage.place

    def watch(self, dim, device):
        before = len(self._free)
        triangle = place(self, dim, device)
        placed.append(4 * (dim + 1) * dim if len(self._free) > before else 0)
        return triangle

    monkeypatch.setattr(Storage, "place", watch)
    cov = capture(model, batches, memory_budget=40_000, buffer_rows=16, checkpoint=tmp_path / "c")
    windows = sorted((tmp_path / "c" / "result").iterdir())
    assert 2 < len(windows) < len(placed) and sum(placed) / len(windows) < 40_000
    assert cov.groups == whole.groups
    assert all(torch.equal(cov[name], whole[name]) for name in whole.modules)


def test_results_of_windows_live_in_a_temporary_folder_as_long_as_the_result(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cov = capture(MODELS["llama"](), make_batches("llama", 1), memory_budget="100kb", buffer_rows=64)
    (folder,) = tmp_path.iterdir()
    assert cov["model.layers.1.mlp.down_proj"].shape == (80, 80) and len(list(folder.iterdir())) > 1
    cov.save(tmp_path / "kept")
    del cov
    gc.collect()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_a_failed_windowed_capture_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(KoreError, match=r"layers\.1\.mlp\.gate_proj: its input holds NaN or infinity"):
        capture(model, make_batches("llama", 1), memory_budget="100kb", buffer_rows=64)
    assert not list(tmp_path.iterdir())


def test_an_iterator_can_only_be_read_once():
    model, batches = MODELS["llama"](), make_batches("llama", 2)
    enough = capture(model, iter(batches), memory_budget="10MB")
    whole = capture(model, batches)
    assert all(torch.equal(enough[name], whole[name]) for name in whole.modules)
    with pytest.raises(KoreError, match="give a list or a data loader, not an iterator"):
        capture(model, iter(batches), memory_budget="100kb", buffer_rows=64)


class Shrinking:
    """Batches of which each pass gives one less."""

    def __init__(self) -> None:
        self.left = 4

    def __iter__(self):
        self.left -= 1
        return iter(make_batches("llama", self.left))


def test_passes_that_see_other_data_are_an_error():
    with pytest.raises(KoreError, match=r"pass 1 gave 2 batches with 112 tokens, pass 2 gave 1 with 56"):
        capture(MODELS["llama"](), Shrinking(), memory_budget="100kb", buffer_rows=64)


def test_a_disk_that_is_too_small_is_said_before_the_first_pass(monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(KoreError, match="on disk, 10 B are free"):
        capture(MODELS["llama"](), make_batches("llama", 1), memory_budget="100kb", buffer_rows=64)


def test_more_than_is_free_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("kore.capture.engine.free_bytes", lambda device: 1000)
    monkeypatch.setattr("kore.capture.plan.free_bytes", lambda device: 1000)
    capture(MODELS["llama"](), [make_batch("llama")])
    assert "on cpu and 1000 B are free; set a memory budget" in caplog.text


def test_a_matrix_that_visits_the_device_leaves_the_other_of_its_pair_alone():
    torch.manual_seed(0)
    storage, cpu = Storage("offload", torch.float64), torch.device("cpu")
    pair = [Accumulator(7, cpu, storage, buffer_rows=8) for _ in range(2)]
    sums = [torch.zeros(7, 7, dtype=torch.float64) for _ in pair]
    for accumulator in pair:
        accumulator.place()
        accumulator.visits = True  # as if the rows were on a GPU
    for _ in range(5):
        for accumulator, total in zip(pair, sums):
            x = torch.randn(5, 7)
            accumulator.add(Rows(x, None, 5))
            total += x.T.double() @ x.double()
    for accumulator, total in zip(pair, sums):
        accumulator.flush()
        torch.testing.assert_close(accumulator.place().full(), total)


_GOOD = {"12GiB": 12 * GIB, "1.5g": 3 * GIB // 2, "500 MB": 500_000_000, 7: 7, "7b": 7, "2TiB": 2048 * GIB}


@pytest.mark.parametrize(
    ("text", "count"), [*_GOOD.items(), *((bad, None) for bad in ("1e9", 0, "", "-3", "0.1", True))]
)
def test_sizes(text, count):
    if count is None:
        with pytest.raises(KoreError, match="expected a number of bytes or text like 12GiB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == count


def test_sizes_as_text():
    texts = [format_bytes(count) for count in (0, 1023, 1024, 1536, 22 * GIB, 5 * 1024**5)]
    assert texts == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "22.0 GiB", "5120.0 TiB"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_budget": "lots"}, "memory_budget: expected a number of bytes or text like 12GiB"),
        ({"storage": "ram"}, "storage: expected one of auto, packed, square, offload, got 'ram'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(KoreError, match=message):
        capture(MODELS["llama"](), make_batches("llama", 1), **arguments)


def test_a_checkpoint_of_one_pass_does_not_become_one_of_several(tmp_path: Path):
    model, batches = MODELS["llama"](), make_batches("llama", 2)
    capture(model, batches, checkpoint=tmp_path / "c", buffer_rows=64)
    with pytest.raises(KoreError, match="written by a capture in one pass, this one takes"):
        capture(model, batches, checkpoint=tmp_path / "c", buffer_rows=64, memory_budget="100kb")
