"""`kore bench lora` and the training-step comparison: what is timed is right, and is what its name says."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F

from kore.bench import lora, lora_peers, memory, show_lora, step, step_peers
from kore.bench.check import InaccurateError
from kore.bench.lora_layers import Case, Layers
from kore.bench.lora_peers import FROZEN, GROUP, MERGED, OFFICIAL, OURS, PEFT, PEFT_COMPILED, PEFT_TRAINED
from kore.bench.timing import Clock
from kore.cli import main

CPU = torch.device("cpu")
SINGLE = Case(24, (20,), 16, 5, torch.float32)
PAIR = Case(24, (20, 12), 16, 5, torch.float32)
STACK = step_peers.LlamaShape(2, 64, 96, 2, 64)


def running(case, *without):
    return [peer for peer in lora_peers.select(case, CPU)[0] if peer.name not in without]


@pytest.fixture(scope="module")
def measured():
    """Both cases by every peer but the compiled one, which takes its time to compile."""
    clock = Clock(CPU)
    return [lora.measure(case, clock, running(case, PEFT_COMPILED), rounds=3) for case in (SINGLE, PAIR)]


def test_the_exact_results_are_those_of_autograd():
    layers = Layers.random(PAIR, CPU)
    x = layers.x.double().requires_grad_()
    Bs = [B.double().requires_grad_() for B in layers.Bs]
    U = layers.U.double()
    ys = [x @ W.double().T + x @ U @ R.double().T @ B.T for W, R, B in zip(layers.weights, layers.Rs, Bs)]
    torch.autograd.backward(ys, [g.double() for g in layers.gs])
    frozen, adapted = layers.exact()
    for found, wanted in zip(adapted, [*(y.detach() for y in ys), x.grad, *(B.grad for B in Bs)], strict=True):
        torch.testing.assert_close(found, wanted)
    for found, weight in zip(frozen, layers.weights):
        torch.testing.assert_close(found, layers.x.double() @ weight.double().T)
    for A, R in zip(layers.As, layers.Rs):
        torch.testing.assert_close(A, R @ layers.U.T)


def test_the_flop_floor_is_that_of_the_design():
    floors = [Case(K, (N,), 1, 256, torch.float32).floor() for K, N in ((4096, 4096), (4096, 11008), (11008, 4096))]
    assert floors == pytest.approx([1.156, 1.117, 1.097], abs=5e-4)
    case = Case(2048, (2048,), 1024, 235, torch.float32)
    assert case.floor() == pytest.approx(1 + 235 * (2 * 2048 + 3 * 2048) / (2 * 2048 * 2048))
    attention = Case(4096, (4096,) * 3, 1, 256, torch.float32)
    assert attention.floor() == floors[0] > attention.floor(shared=True) > 1.11
    uneven = Case(8, (4, 2), 1, 1, torch.float32)
    assert [each.shape for each in (attention, case, uneven)] == ["4096→4096 ×3", "2048→2048", "8→4+2"]


def test_every_contender_is_there_with_all_measures(measured):
    single, pair = measured
    assert list(single["contenders"]) == [FROZEN, OURS, MERGED, PEFT, PEFT_TRAINED, OFFICIAL]
    assert list(pair["contenders"]) == [FROZEN, OURS, MERGED, GROUP, PEFT, PEFT_TRAINED, OFFICIAL]
    for case in measured:
        assert case["refused"] == {} and case["rounds"] == 3
        for name, row in case["contenders"].items():
            assert set(row["relative_error"]) == ({"y", "dx"} if name == FROZEN else {"y", "dx", "dB"})
            assert max(row["relative_error"].values()) < 1e-6
            forward, backward, both = (row[part]["median_ms"] for part in ("forward", "backward", "both"))
            assert 0 < max(forward, backward) < both < 1e3
    assert pair["contenders"][GROUP]["floor"] < pair["contenders"][OURS]["floor"]
    peft, ours = (single["contenders"][name] for name in (PEFT, OURS))
    excess = [row["over_frozen"]["median"] - row["floor"] for row in (ours, peft)]
    assert ours["gap_left"] is None or ours["gap_left"] == pytest.approx(excess[0] / excess[1])


def test_kept_bytes_are_h_alone_and_x_where_a_is_trained(measured):
    h, padded, x = 4 * 16 * 5, 4 * 16 * 16, 4 * 16 * 24
    single, pair = ({name: row["saved_bytes"] for name, row in case["contenders"].items()} for case in measured)
    assert single == {FROZEN: 0, OURS: padded, MERGED: padded, PEFT: h, PEFT_TRAINED: h + x, OFFICIAL: h}
    assert (pair[OURS], pair[GROUP], pair[PEFT_TRAINED]) == (2 * padded, padded, 2 * h + x)


def test_bytes_are_counted_once_and_only_those_of_this_pass():
    constant = torch.ones(8, 4, requires_grad=True)

    def forward():
        x = torch.ones(4, 4, requires_grad=True)
        return (x[:2] * constant[:2]).sum() + (x[2:] * constant[4:6]).sum()

    assert memory.saved_bytes(forward) == 4 * 16
    assert memory.peak_bytes(lambda: None, CPU) is None


@pytest.mark.parametrize("fault", ["no gradient of B", "wrong dx", "wrong y", "too coarse"])
def test_nothing_is_timed_when_ours_is_wrong(fault):
    def build(layers):
        Bs = [B.clone().requires_grad_() for B in layers.Bs]

        def forward(x):
            (W,), (A,), (B,) = layers.weights, layers.As, Bs
            y = F.linear(x, W) + F.linear(F.linear(x, A), B.detach() if fault == "no gradient of B" else B)
            if fault == "wrong dx":
                y = y + 0.1 * (x - x.detach()).sum()
            return [y + 0.1 if fault == "wrong y" else y.bfloat16().float() if fault == "too coarse" else y]

        return lora_peers.Built(forward, Bs)

    others = running(SINGLE, PEFT_COMPILED, OURS)
    ours = next(peer for peer in lora_peers.PEERS if peer.name == OURS)
    peers = [others[0], dataclasses.replace(ours, build=build), *others[1:]]
    expected = RuntimeError if fault == "no gradient of B" else InaccurateError
    with pytest.raises(expected, match=r"no gradient|lora_fa_linear, (y|dx) at 24→20, N=16, r=5, float32: relative"):
        lora.measure(SINGLE, Clock(CPU), peers, rounds=1)


def test_a_peer_that_refuses_is_named_and_one_that_is_wrong_stops_the_run():
    def refuses(layers):
        raise TypeError("not on this architecture\nand more")

    needed = [peer for peer in running(SINGLE) if peer.name in (FROZEN, OURS, PEFT)]
    away = dataclasses.replace(needed[0], name="away", build=refuses)
    case = lora.measure(SINGLE, Clock(CPU), [*needed, away], rounds=1)
    assert case["refused"] == {"away": "TypeError: not on this architecture"}
    wrong = dataclasses.replace(needed[0], name="wrong")
    with pytest.raises(InaccurateError, match=r"wrong, y at .* allowed are 2\.00e-02"):
        lora.measure(SINGLE, Clock(CPU), [*needed, wrong], rounds=1)


def test_peers_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, reasons = lora_peers.select(SINGLE, CPU)
    assert reasons[GROUP] == "one layer is no group" and "C++ compiler" in reasons[PEFT_COMPILED]
    assert {"Unsloth LoRA_W", "LoRAFusion"} <= set(reasons)


def test_peft_is_peft_and_only_what_should_train_trains():
    from peft.tuners.lora.layer import Linear

    layers = Layers.random(PAIR, CPU)
    peers = {peer.name: peer for peer in lora_peers.PEERS}
    for name in (PEFT, PEFT_TRAINED):
        built = peers[name].build(layers)
        assert [type(layer) for layer in built.forward.layers] == [Linear, Linear]
        flags = {key.split(".")[2]: p.requires_grad for key, p in built.forward.named_parameters()}
        assert flags == {"base_layer": False, "lora_A": name == PEFT_TRAINED, "lora_B": True}
        assert len(built.others) == (2 if name == PEFT_TRAINED else 0)


def test_the_command_writes_a_table_a_picture_and_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling takes its time
    words = ["bench", "lora", "--quick", "--device", "cpu", "--layers", "48:32,48:32+16", "--ranks", "4,100"]
    picture, numbers = tmp_path / "new" / "a.png", tmp_path / "new" / "a.json"
    assert main([*words, "--ranks", "4,7", "--output", str(picture), "--json", str(numbers), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "48→32 N=64 r=7 float32" in shown and "48→32+16 N=64 r=4 float32" in shown
    assert re.search(r"PEFT, A frozen, compiled: torch.compile needs a C\+\+\s+compiler", shown)
    assert max(len(line) for line in shown.splitlines() if "e-0" in line) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(numbers.read_text())
    assert result["backend"] == "native" and result["machine"]["threads"] == 1 and result["environment"]["torch"]
    assert [(case["shape"], case["rank"]) for case in result["cases"]] == [
        (shape, rank) for shape in ("48→32", "48→32+16") for rank in (4, 7)
    ]
    panels = show_lora.figure(result).axes
    assert [panel.get_title() for panel in panels] == ["48→32, 64 tokens, float32", "48→32+16, 64 tokens, float32"]


def test_a_rank_above_the_width_is_left_out():
    plan = lora.Plan([(8, (8,)), (32, (8,))], [4], [6, 16], [torch.float32])
    assert [(case.d_in, case.rank) for case in plan.cases()] == [(8, 6), (32, 6), (32, 16)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "64"], "--layers: expected d_in:d_out or d_in:d_out+d_out"),
        (["--layers", "64:0"], "--layers: expected d_in:d_out or d_in:d_out+d_out"),
        (["--ranks", "none"], "--ranks: expected whole numbers above 0"),
        (["--tokens", "-1"], "--tokens: expected whole numbers above 0"),
        (["--dtype", "int8"], "--dtype: expected float32, bfloat16, float16, got 'int8'"),
        (["--backend", "triton", "--device", "cpu"], "KORE_BACKEND=triton cannot run"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_every_way_to_call_it_wrongly_is_one_line(words, message, capsys):
    assert main(["bench", "lora", "--quick", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("command", ["lora", "step"])
def test_help_has_an_example(command, capsys):
    assert main(["bench", command, "--help"]) == 0
    assert re.search(rf"Example:\s+kore bench {command}", capsys.readouterr().out)


@pytest.fixture(scope="module")
def stack():
    return step_peers.random_llama(STACK, CPU, torch.float32), step.text_batch(STACK.vocabulary, 1, 24, CPU)


def test_the_models_share_the_base_and_start_equal(stack):
    base, _ = stack
    places = {parameter.data_ptr() for parameter in base.parameters()}
    factors = step_peers.random_factors(base, 6)
    first, second = step_peers.peft(base, factors), step_peers.accelerated(base, factors, "exact")
    for trained in (first, second, step_peers.official(base, factors)):
        assert places <= {parameter.data_ptr() for parameter in trained.model.parameters()}
        assert len(trained.Bs) == 14 and {id(p) for p in trained.parameters()} == {id(B) for B in trained.Bs.values()}
        torch.testing.assert_close(list(trained.Bs.values()), list(first.Bs.values()))
    assert not {B.data_ptr() for B in first.Bs.values()} & {B.data_ptr() for B in second.Bs.values()}
    assert type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_steps_are_checked_timed_and_weighed(stack):
    found = step.measure(*stack, Clock(CPU), rank=6, lora_rank=3, rounds=3)
    assert list(found["contenders"]) == [
        step_peers.FROZEN,
        "PEFT r=6, A frozen",
        "PEFT r=3, A trained",
        step_peers.OURS,
        step_peers.MERGED,
        step_peers.OFFICIAL,
    ]
    assert found["rounds"] == 3 and found["tokens"] == 24 and set(found["refused"]) == {step_peers.LIGER}
    rows = found["contenders"]
    for name, row in rows.items():
        assert max(row["relative_error"].values()) < 1e-5
        assert ("dB" in row["relative_error"]) == (name != step_peers.FROZEN)
        assert row["tokens_per_second"] == pytest.approx(24e3 / row["step"]["median_ms"])
    trained = sum(6 * (module.out_features) for name, module in stack[0].named_modules() if name.endswith("_proj"))
    assert rows[step_peers.OURS]["trained_parameters"] == trained
    # h of every group of layers, padded to 16 columns, on top of what the frozen model keeps
    kept = {name: row["saved_bytes"] for name, row in rows.items()}
    assert kept[step_peers.OURS] == kept[step_peers.FROZEN] + 2 * 4 * (4 * 24 * 16)
    assert rows[step_peers.FROZEN]["resident_bytes"] < rows[step_peers.OURS]["resident_bytes"]


def test_the_step_command_writes_a_table_and_numbers(tmp_path, capsys):
    words = ["bench", "step", "--quick", "--device", "cpu", "--shape", "1,32,48,2,64", "--tokens", "9", "--rank", "5"]
    assert main([*words, "--json", str(tmp_path / "new" / "a.json"), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"kore.accelerate, merged\s+\d", shown) and "layers 1, width 32, inner 48, heads 2" in shown
    assert max(len(line) for line in shown.splitlines() if "e-0" in line) <= 80
    result = json.loads((tmp_path / "new" / "a.json").read_text())
    assert result["tokens"] == 9 and result["rank"] == 5 and result["backend"] == "native"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "1,32,48"], "--shape: expected layers,width,inner,heads,vocabulary"),
        (["--shape", "1,32,48,3,64"], "--shape: expected layers,width,inner,heads,vocabulary"),
        (["--dtype", "float32,bfloat16"], "--dtype: expected float32, bfloat16, float16, got 'float32,bfloat16'"),
        (["--rank", "65"], "--rank: expected at most the width 64, got 65 and 8"),
    ],
)
def test_every_way_to_ask_wrongly_for_steps_is_one_line(words, message, capsys):
    assert main(["bench", "step", "--quick", "--device", "cpu", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.skipif(PEFT_COMPILED in lora_peers.select(SINGLE, CPU)[1], reason="no C++ compiler")
def test_the_compiled_peft_is_compiled_whole():
    torch.compiler.reset()
    peers = [peer for peer in running(SINGLE) if peer.name in (FROZEN, OURS, PEFT, PEFT_COMPILED)]
    case = lora.measure(SINGLE, Clock(CPU), peers, rounds=1)
    assert case["refused"] == {} and case["contenders"][PEFT_COMPILED]["saved_bytes"] == 4 * 16 * 5


def test_a_model_whose_gradients_are_wrong_is_not_timed(stack, monkeypatch):
    import kore_kernels as kk

    real = kk.lora_fa_linears

    def without_gradient(x, weights, biases, U, Rs, Bs, scaling=1.0):
        return real(x, weights, biases, U, Rs, [B.detach() * 1.01 + 0 * B for B in Bs], scaling)

    monkeypatch.setattr(kk, "lora_fa_linears", without_gradient)
    with pytest.raises(InaccurateError, match=r"kore.accelerate, (loss|dx|dB) at 24 tokens, r=6, float32"):
        step.measure(*stack, Clock(CPU), rank=6, lora_rank=3, rounds=1)


def test_steps_with_checkpoints_are_checked_on_a_few_texts_against_a_wider_copy(stack):
    base = step_peers.random_llama(STACK, CPU, torch.bfloat16)
    batch = {key: torch.cat([value, value.flip(1)]) for key, value in stack[1].items()}
    found = step.measure(
        base, batch, Clock(CPU), 6, 3, rounds=1, wide=torch.float32, texts=1, checkpointing=True
    )  # fmt: skip
    assert found["checked_against"] == "float32" and found["dtype"] == "bfloat16"
    assert found["tokens"] == 2 * stack[1]["input_ids"].numel()
    assert found["contenders"][step_peers.OURS]["saved_bytes"] is None
    assert set(found["contenders"][step_peers.OURS]["relative_error"]) == {"loss", "dx", "dB"}
