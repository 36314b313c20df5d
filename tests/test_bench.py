"""The benchmarks measure what they name: gates that close, clocks that keep time, suites that run without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kore.bench import capture, covariance, machine, official, peers, show
from kore.bench.check import InaccurateError
from kore.bench.covariance import Plan
from kore.bench.llava import TINY, random_batches, random_llava
from kore.bench.machine import Roofline
from kore.bench.timing import Clock, in_turn, ratio
from kore.cli import main
from kore.errors import KoreError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# On the machine that is lent for the GPU suite these are missing.
NOT_ON_THE_GPU_MACHINE = ("pydantic", "datasets", "scipy", "matplotlib", "attr", "sklearn", "threadpoolctl")


@pytest.fixture(scope="module")
def llava():
    return random_llava(TINY, CPU, torch.float32), random_batches(TINY, 2, 1, 10, torch.float32)


def test_every_round_runs_every_step_and_starts_with_another():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}

    def measure(step):
        step()
        return float(len(order))

    times = in_turn(steps, measure, rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert times == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_no_round_begins_that_would_end_too_late():
    times = in_turn({"a": lambda: None}, lambda step: time.sleep(0.02) or 1.0, rounds=50, seconds=0.2)
    assert 3 <= len(times["a"]) <= 10


def test_the_clock_times_the_step_alone():
    clock = Clock(CPU)
    assert 20 <= clock.milliseconds(lambda: time.sleep(0.02)) < 200
    assert ratio([4.0, 9.0, 8.0], [2.0, 3.0, 8.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


def test_a_host_that_is_too_slow_for_a_gpu_is_told_and_gets_more_time(monkeypatch):
    class Event:
        """Of a device that does everything at once."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(CPU)
    clock.device, clock._buffer, clock._fill_seconds = torch.device("cuda"), torch.zeros(4), 0.03
    waits = [clock.laps(lambda: time.sleep(0.01), lambda: time.sleep(0.03)) for _ in range(2)]
    assert all(10 <= short < 30 <= long < 100 for short, long in waits)
    assert clock._fills == 2 and not clock.launch_bound
    assert clock.milliseconds(lambda: time.sleep(0.1)) >= 100 and clock.launch_bound and clock._fills == 4


def test_the_floor_is_the_larger_of_traffic_and_arithmetic():
    roofline = Roofline(1e9, {"float32": 1e9})
    assert roofline.floor(1000, 1, torch.float32) == (pytest.approx((4 * 1000 * 1001 + 4000) / 1e9), "memory")
    assert roofline.floor(1000, 50, torch.float32) == (pytest.approx(50 * 1000 * 1001 / 1e9), "compute")


def test_measured_rates_are_of_this_machine():
    measured = machine.measure_roofline(Clock(CPU), (torch.float32, torch.bfloat16), quick=True)
    assert 1e8 < measured.bytes_per_second < 1e13
    assert all(1e8 < rate < 1e15 for rate in measured.flops_per_second.values())
    slower = Roofline(2 * measured.bytes_per_second, {"float32": 1.0, "bfloat16": 1e16})
    assert measured.best(slower) == Roofline(
        slower.bytes_per_second, {"float32": measured.flops_per_second["float32"], "bfloat16": 1e16}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_peer_computes_what_it_is_timed_for(dtype):
    running, left_out = peers.select(CPU, dtype)
    assert [peer.name for peer in running[:2]] == [peers.OURS, peers.ADDMM]
    assert {peer.name for peer in running} | set(left_out) == {peer.name for peer in peers.PEERS}
    for peer in running:
        x, C = torch.randn(70, 33).to(dtype), torch.zeros(33, 33)
        error = covariance.relative_error(C, x, peer, peer.prepare(C, x))
        assert error < (1e-6 if peer.name in (peers.OURS, peers.ADDMM) or dtype == torch.float32 else 1e-2)


def test_ssyrk_writes_the_lower_triangle_of_c_itself():
    x, C = torch.randn(20, 7), torch.zeros(7, 7)
    peer = next(peer for peer in peers.PEERS if peer.name == "SciPy ssyrk")
    peer.prepare(C, x)()
    torch.testing.assert_close(C, (x.T @ x).tril())


@pytest.mark.parametrize("fault", ["wrong tile", "overwrites", "nothing", "too coarse"])
def test_nothing_is_timed_when_ours_is_wrong(fault):
    def prepare(C, x):
        def step():
            if fault == "overwrites":
                C.copy_(x.T @ x)
            elif fault == "too coarse":
                C.add_((x.T @ x).bfloat16())
            elif fault == "wrong tile":
                C.add_(x.T @ x)
                C[500:502] += 1

        return step

    running, _ = peers.select(CPU, torch.float32)
    broken = [dataclasses.replace(running[0], prepare=prepare), running[1]]
    with pytest.raises(InaccurateError, match=r"covariance_update_ at d=600, N=50, float32: relative error"):
        covariance.measure(600, 50, torch.float32, Clock(CPU), broken, rounds=1)


def test_a_peer_that_refuses_is_named_and_one_that_is_wrong_stops_the_run():
    def refuses(C, x):
        raise TypeError("not on this architecture\nand more")

    running, _ = peers.select(CPU, torch.float32)
    away = dataclasses.replace(running[2], prepare=refuses)
    case = covariance.measure(20, 8, torch.float32, Clock(CPU), [*running[:2], away], rounds=3)
    assert case["refused"] == {away.name: "TypeError: not on this architecture"}
    assert list(case["contenders"]) == [peers.OURS, peers.ADDMM] and case["rounds"] == 3
    wrong = dataclasses.replace(running[2], prepare=lambda C, x: lambda: C.add_(2 * x.T @ x))
    with pytest.raises(InaccurateError, match=r"relative error 1\.00e\+00, allowed are 2\.00e-02"):
        covariance.measure(20, 8, torch.float32, Clock(CPU), [*running[:2], wrong], rounds=3)


def test_the_official_term_as_written_down():
    x = torch.tensor([[1.0, -8.0], [2.0, 4.0]])
    torch.testing.assert_close(official.official_term(x), (x / 4).T @ (x / 4) / 256)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError):
            official.official_term(torch.tensor([[1.0, value]]))


def test_official_hooks_sum_over_samples_and_leave(llava):
    model, batches = llava
    capture.plain_pass(model, batches[:1])  # transformers adds hooks of its own in its first pass
    before = [list(module._forward_hooks) for module in model.modules()]
    with official.official_hooks(model) as sums:
        capture.plain_pass(model, batches[:1])
        once = {name: value.clone() for name, value in sums.items()}
        capture.plain_pass(model, batches[:1])
    assert len(sums) == 2 * 7
    torch.testing.assert_close(sums, {name: 2 * value for name, value in once.items()})
    assert [list(module._forward_hooks) for module in model.modules()] == before


def test_a_capture_is_checked_timed_and_set_beside_the_official_hooks(llava):
    found = capture.measure(*llava, Clock(CPU), rounds=3)
    assert found["rounds"] == 3 and found["tokens"] == 2 * 26
    assert max(found["relative_error"].values()) < 1e-5
    assert set(found["over_plain"]) == {capture.CAPTURE, capture.CAPTURE_SCALED, capture.OFFICIAL}
    times = found["median_s"]
    share = (times[capture.CAPTURE] - times[capture.PLAIN]) / (times[capture.OFFICIAL] - times[capture.PLAIN])
    assert found["overhead_of_official"][capture.CAPTURE]["of_medians"] == pytest.approx(share)


def test_a_wrong_capture_is_not_timed(llava, monkeypatch):
    import kore

    model, batches = llava
    real = kore.capture_covariance
    monkeypatch.setattr(kore, "capture_covariance", lambda model, batches, **rest: real(model, batches[:1], **rest))
    with pytest.raises(InaccurateError, match="capture: relative error"):
        capture.measure(model, batches, Clock(CPU), rounds=1)


def test_the_command_writes_a_table_a_picture_and_numbers(tmp_path, capsys):
    words = ["bench", "covariance", "--quick", "--device", "cpu", "--d", "64", "--n", "16,40", "--rounds", "3"]
    picture, numbers = tmp_path / "new" / "a.png", tmp_path / "new" / "a.json"
    assert main([*words, "--output", str(picture), "--json", str(numbers), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"float32\s+64\s+16\s+covariance_update_", shown) and "C.addmm_(x.T, x)" in shown
    assert picture.read_bytes().startswith(b"\x89PNG") and not list(picture.parent.glob(".*"))
    result = json.loads(numbers.read_text())
    assert len(result["cases"]) == 4 and result["backend"] == "native" and result["machine"]["threads"] == 1
    for case in result["cases"]:
        ours = case["contenders"][peers.OURS]
        assert ours["of_roofline"] == pytest.approx(case["floor_ms"] / ours["median_ms"])
    assert result["environment"]["torch"] and result["roofline"]["bytes_per_second"] > 0
    assert max(len(line) for line in shown.splitlines() if "e-0" in line) <= 80


def test_every_way_to_call_it_wrongly_is_one_line(tmp_path, capsys):
    bench = ["bench", "covariance", "--quick"]
    for words, message in (
        (["--d", "ten"], "--d: expected whole numbers above 0"),
        (["--n", "0"], "--n: expected whole numbers above 0"),
        (["--dtype", "int8"], "--dtype: expected float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:7"], "device: cuda:7 is not here"),
        (["--backend", "fast"], "--backend: expected auto, native"),
        (["--backend", "triton", "--device", "cpu"], "KORE_BACKEND=triton cannot run covariance_update"),
    ):
        assert main([*bench, *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_settings_are_put_back(monkeypatch):
    monkeypatch.setenv("KORE_BACKEND", "native")
    threads = torch.get_num_threads()
    with machine.settings(CPU, "reference", threads + 1):
        assert machine.backend_of("covariance_update", CPU) == "reference" and torch.get_num_threads() == threads + 1
    assert os.environ["KORE_BACKEND"] == "native" and torch.get_num_threads() == threads
    monkeypatch.delenv("KORE_BACKEND")
    with pytest.raises(KoreError), machine.settings(CPU, "triton"):
        pass
    assert "KORE_BACKEND" not in os.environ


@pytest.mark.parametrize("words", [["bench", "--help"], ["bench", "covariance", "--help"]])
def test_help_has_an_example(words, capsys):
    assert main(words) == 0
    assert re.search(r"Example:\s+kore bench covariance", capsys.readouterr().out)


def suite(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the GPU suite where the packages that its machine lacks cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({NOT_ON_THE_GPU_MACHINE!r}))"
    code = f"{block}; sys.argv[1:] = {list(words)!r}; from benchmarks.gpu_suite import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
    )


@pytest.mark.slow
def test_the_gpu_suite_runs_whole_on_tiny_shapes(tmp_path):
    ended = suite(tmp_path, "--device", "cpu", "--quick", "--output", "gpu.json", "--commit", "abc")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["wrong"] == result["missed"] == [] and result["environment"]["commit"] == "abc"
    assert set(result["correctness"]) == {"native", "torch", "reference"}
    from benchmarks import gpu_lora
    from benchmarks.gpu_covariance import cases, checks

    assert len(result["correctness"]["native"]) == len(checks(True)) and len(checks(False)) == len(checks(True))
    assert len(result["covariance"]["cases"]) == len(cases(True))
    assert result["model"]["batches of 1"]["overhead_of_official"] and result["model"]["goals"]
    assert len(result["lora correctness"]["checks"]) == len(gpu_lora.checks(True))
    assert [case["refused"] for case in result["lora"]["cases"]] == [{}] * len(gpu_lora.cases(True))
    assert {goal["found"] for goal in result["lora"]["goals"].values()} == {None}
    assert result["training step"]["rounds"] >= 3 and len(result["training step"]["contenders"]) == 6
    assert result["init correctness"]["adapter"]["layers"] == result["init"]["linears"] == 14
    assert result["init"]["official"]["total_s"] > 0 and len(result["init"]["solver"]) == 6
    assert all(goal.get("most", goal.get("least")) for goal in result["init"]["goals"].values())
    assert {(d, n) for _, d, n in cases(False)} == {
        (d, n) for d in (1024, 4096, 5120, 11008, 13824, 18944) for n in (600, 2048, 8192)
    }


def test_the_gpu_suite_says_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu_suite

    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--output", str(tmp_path / "gpu.json")])
    assert gpu_suite.main() == 2
    assert "no CUDA GPU here" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_the_gpu_suite_tests_the_backend_that_it_is_told(monkeypatch, backend):
    from benchmarks import gpu_suite

    suites = []
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--backend", backend])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(gpu_suite, "Clock", lambda device: None)
    monkeypatch.setattr(gpu_suite, "run", lambda suite, *rest: suites.append(suite) or 0)
    assert gpu_suite.main() == 0
    assert suites[0].backend == backend and suites[0].output.stem == {"triton": "gpu", "native": "gpu_native"}[backend]


def make_suite(tmp_path, seconds=100.0):
    from benchmarks.gpu_suite import Suite

    return Suite(CPU, True, tmp_path / "gpu.json", time.monotonic() + seconds, Clock(CPU))


def test_a_wrong_kernel_fails_the_gpu_suite_and_is_not_timed(tmp_path, monkeypatch):
    import kore_kernels as kk
    from benchmarks.gpu_suite import run

    real = kk.covariance_update_

    def writes_everything(C, x, **rest):
        real(C, x, **rest)
        return C.nan_to_num_(0.0)

    monkeypatch.setattr(kk, "covariance_update_", writes_everything)
    assert run(make_suite(tmp_path), ["correctness", "covariance", "model"], None) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert any("the other triangle was written" in line for line in result["wrong"])
    assert any("did not reach exactly its row and column" in line for line in result["wrong"])
    assert "covariance" not in result and "model" not in result


def test_the_gpu_suite_is_run_in_portions(tmp_path, monkeypatch):
    from benchmarks import gpu_suite

    ran = []

    def section(name):
        return gpu_suite.Section(name, lambda suite: ran.append(name) or {"of": suite.backend}, 1.0)

    needy = gpu_suite.Section("times", lambda suite: {"of": 1}, 1.0, needs="one")
    monkeypatch.setattr(gpu_suite, "SECTIONS", (section("one"), section("two"), needy))
    first, second = make_suite(tmp_path), make_suite(tmp_path)
    assert gpu_suite.run(first, ["one"], "abc", add=True) == 0
    assert gpu_suite.run(second, ["two", "times"], "abc", add=True) == 0 and ran == ["one", "two"]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {"one", "two", "times"} <= set(result) and set(result["seconds"]) == {"one", "two", "times"}
    with pytest.raises(SystemExit, match=r"its environment is .*abc.* give another --output"):
        gpu_suite.run(make_suite(tmp_path), ["two"], "another", add=True)
    (tmp_path / "gpu.json").write_text(json.dumps({**result, "wrong": ["one: off by one"]}))
    assert gpu_suite.run(make_suite(tmp_path), ["times"], "abc", add=True) == 1
    wrong = json.loads((tmp_path / "gpu.json").read_text())["wrong"]
    assert wrong == ["one: off by one", "times: not run, because one found something wrong"]


def test_a_kernel_that_raises_is_one_fault_and_the_other_checks_go_on(tmp_path, monkeypatch):
    import kore_kernels as kk
    from benchmarks.gpu_suite import run

    real = kk.covariance_update_

    def breaks_on_weights(C, x, *, weight=None, **rest):
        if weight is not None:
            raise RuntimeError("no such instruction\nand more")
        return real(C, x, **rest)

    monkeypatch.setattr(kk, "covariance_update_", breaks_on_weights)
    assert run(make_suite(tmp_path), ["correctness"], None) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert len(result["wrong"]) == 3 * 5 and all("RuntimeError: no such" in line for line in result["wrong"])
    assert len(result["correctness"]["native"]) == 27 - 5


def test_the_gpu_suite_ends_in_time_with_what_it_has(tmp_path):
    from benchmarks.gpu_suite import run

    assert run(make_suite(tmp_path, seconds=4.0), ["correctness"], None) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["wrong"] == []
    assert result["missed"] == [f"{name}: 27 checks" for name in ("native", "torch", "reference")]
    assert "correctness" in result


def test_a_section_that_breaks_does_not_lose_the_others(tmp_path, monkeypatch):
    from benchmarks import gpu_suite

    def breaks(suite):
        raise ZeroDivisionError("a bug\nwith details")

    section = dataclasses.replace(gpu_suite.SECTIONS[1], run=breaks)
    monkeypatch.setattr(gpu_suite, "SECTIONS", (gpu_suite.SECTIONS[0], section))
    assert gpu_suite.run(make_suite(tmp_path), ["roofline", "correctness"], None) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["roofline"]["bytes_per_second"] > 0 and result["wrong"] == ["correctness: ZeroDivisionError: a bug"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_an_update_is_seen():
    from benchmarks.peak_memory import measured

    size = 4 * 1024**2
    assert 0.9 * size <= measured("C += x.T @ x", "float32", d=1024, n=16, threads=1) < 8 * size
    assert measured(peers.OURS, "float32", d=1024, n=16, threads=1) < size


def test_the_picture_has_a_panel_for_every_dtype_and_dim():
    result = covariance.run(Plan((16, 24), (8, 20), (torch.float32,), rounds=3, quick=True), CPU)
    panels = show.figure(result).axes
    assert [panel.get_title() for panel in panels] == ["float32 x, d = 16", "float32 x, d = 24"]
    assert all(len(panel.lines) == 1 + len(result["cases"][0]["contenders"]) for panel in panels)
