"""The LoRA sections of the GPU suite on tiny shapes: gates that close, goals that weigh what they say they weigh."""

from __future__ import annotations

import json
import time

import pytest
import torch

import kore_kernels as kk
from benchmarks import gpu_lora, gpu_suite
from kore.bench.lora_peers import FROZEN, GROUP, MERGED, OURS, PEFT, PEFT_COMPILED
from kore.bench.machine import backend_of
from kore.bench.timing import Clock

CPU = torch.device("cpu")


def run(tmp_path, *names, seconds=100.0):
    """(exit status, what was written)"""
    suite = gpu_suite.Suite(CPU, True, tmp_path / "gpu.json", time.monotonic() + seconds, Clock(CPU))
    return gpu_suite.run(suite, list(names), None), json.loads((tmp_path / "gpu.json").read_text())


def only(monkeypatch, *checks):
    monkeypatch.setattr(gpu_lora, "checks", lambda quick: list(checks))


@pytest.mark.parametrize("kind", ["exact", "dropout", "merged"])
def test_a_wrong_kernel_is_found_and_neither_layers_nor_steps_are_timed(tmp_path, monkeypatch, kind):
    real = kk.lora_fa_linear

    def scaled(x, weight, bias, A, B, scaling=1.0, **options):
        broken = x.dtype == torch.float32 and backend_of("lora_fa_linear", CPU) == "native"
        return real(x, weight, bias, A, B, scaling * (1.01 if broken else 1.0), **options)

    monkeypatch.setattr(kk, "lora_fa_linear", scaled)
    only(monkeypatch, gpu_lora.Check(kind, torch.float32, 7, 20, 24, 16))
    status, result = run(tmp_path, "lora correctness", "lora", "training step")
    assert status == 1 and "lora" not in result and "training step" not in result
    faults = [line for line in result["wrong"] if "relative error" in line]
    assert [line.split(": ")[1] for line in faults] == ["native, y0", "native, dx", "native, dB0"]
    assert result["wrong"][-1] == "training step: not run, because lora correctness found something wrong"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("other bits", "native, y0: the same call gave other bits"),
        ("writes x", "an argument was changed"),
        ("dB of nothing", "torch, dB0: not zero"),
        ("raises", "RuntimeError: no such instruction"),
    ],
)
def test_every_fault_has_its_line(tmp_path, monkeypatch, fault, line):
    real, calls = kk.lora_fa_linear, []

    def broken(x, weight, bias, A, B, scaling=1.0, **options):
        calls.append(1)
        if fault == "raises":
            raise RuntimeError("no such instruction\nand more")
        if fault == "writes x":
            x.data.zero_()
        y = real(x, weight, bias, A, B, scaling, **options)
        if fault == "dB of nothing" and x.dtype == torch.float32:
            return _AddsToB.apply(y, B)
        return y + 2.0**-20 * len(calls) if fault == "other bits" else y

    monkeypatch.setattr(kk, "lora_fa_linear", broken)
    only(monkeypatch, gpu_lora.Check("exact", torch.float32, 7, 0 if fault == "dB of nothing" else 20, 24, 16))
    status, result = run(tmp_path, "lora correctness")
    assert status == 1 and f"lora, {gpu_lora.checks(True)[0]}: {line}" in result["wrong"]


class _AddsToB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, B):
        ctx.save_for_backward(B)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        (B,) = ctx.saved_tensors
        return g, torch.ones_like(B)


def test_what_does_not_fit_into_the_time_is_missed(tmp_path):
    status, result = run(tmp_path, "lora correctness", "lora", "training step", seconds=4.0)
    assert status == 1 and result["wrong"] == []
    assert result["missed"][0] == f"lora: {len(gpu_lora.checks(True))} checks"


def test_sections_share_the_time_and_leave_what_they_do_not_need(tmp_path, monkeypatch):
    seen = {}

    def section(name, seconds):
        def spend(suite):
            seen[name] = suite.left()
            time.sleep(seconds)
            return {}

        return spend

    sections = [gpu_suite.Section("a", section("a", 0.0), 30), gpu_suite.Section("b", section("b", 0.5), 10)]
    sections.append(gpu_suite.Section("c", section("c", 0.0), 10))
    monkeypatch.setattr(gpu_suite, "SECTIONS", tuple(sections))
    run(tmp_path, "a", "b", "c", seconds=50)
    assert (seen["a"], seen["b"], seen["c"]) == (
        pytest.approx(30, abs=2),
        pytest.approx(25, abs=2),
        pytest.approx(49.5, abs=3),
    )
    run(tmp_path, "c", seconds=50)
    assert seen["c"] == pytest.approx(50, abs=2)


def test_all_that_the_goals_are_about_is_timed_and_first():
    planned = gpu_lora.cases(False)
    keys = {(case.d_in, case.d_out, case.tokens, case.rank) for case, _ in planned}
    assert {
        (d_in, (d_out,), n, r)
        for d_in, d_out in ((4096, 4096), (4096, 11008), (11008, 4096))
        for n in (4096, 8192, 16384)
        for r in (64, 128, 235, 240, 256, 274)
    } <= keys
    assert len(planned) == len({(case, compiled) for case, compiled in planned}) == 18 * 3 + 2 + 3
    assert {(case.tokens, case.rank) for case, _ in planned[:11]} == {(8192, 256), (8192, 235), (8192, 240)}
    assert sum(compiled for _, compiled in planned) == 3 and len(gpu_lora.checks(False)) == len(gpu_lora.checks(True))
    assert {check.rank for check in gpu_lora.checks(False)} >= set(gpu_lora.RANKS)


def row(d_in, d_out, rank, **milliseconds):
    return {
        "d_in": d_in,
        "d_out": list(d_out),
        "tokens": 8192,
        "rank": rank,
        "contenders": {name: {"both": {"median_ms": value}} for name, value in milliseconds.items()},
    }


def test_goals_are_weighted_over_a_decoder_layer():
    def all_of(d_in, d_out, frozen, ours, merged, peft, group):
        return row(d_in, d_out, 256, **{FROZEN: frozen, OURS: ours, MERGED: merged, PEFT: peft, GROUP: group})

    rows = [
        all_of(4096, (4096,), 1.0, 1.2, 1.1, 2.0, None),
        all_of(4096, (11008,), 3.0, 3.3, 3.1, 4.0, None),
        all_of(11008, (4096,), 3.0, 3.2, 3.1, 4.0, None),
        all_of(4096, (4096,) * 3, 3.0, 3.6, 3.3, 6.0, 3.3),
        all_of(4096, (11008,) * 2, 6.0, 6.6, 6.2, 8.0, 6.4),
        row(4096, (4096,), 235, **{OURS: 1.02}),
        row(4096, (4096,), 240, **{OURS: 1.00}),
    ]
    found = [goal["found"] for goal in gpu_lora.goals(rows).values()]
    assert found == pytest.approx(
        [
            (3.3 + 1.2 + 6.4 + 3.2) / 13,
            (4 * 1.2 + 2 * 3.3 + 3.2) / 13,
            (4 * 1.1 + 2 * 3.1 + 3.1) / 13,
            (6.0 + 2.0 + 8.0 + 4.0) / (3.3 + 1.2 + 6.4 + 3.2),
            0.02,
        ]
    )
    assert [goal["found"] for goal in gpu_lora.goals([]).values()] == [None] * 5
    compiled_last = [row(4096, (4096,), 256, **{FROZEN: 9.0, PEFT_COMPILED: 9.0}), *rows]
    assert gpu_lora.goals(compiled_last[1:] + compiled_last[:1]) == gpu_lora.goals(rows)
