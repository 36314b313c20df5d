"""Capture against plain float64 hooks, and everything that must not go wrong around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from kore.capture import capture_covariance
from kore.capture import rows as capture_rows
from kore.capture.accumulator import Accumulator
from kore.capture.rows import Rows, counted_rows
from kore.capture.selection import Selection
from kore.capture.storage import Storage
from kore.errors import ArtifactError, KoreError
from kore.models import language_model_linears, named_linears
from tests.batches import KINDS, MODELS, make_batch, make_batches


def hook_oracle(model, batches, names):
    """C of every module by a plain hook, in float64, padding left out by indexing."""
    sums, counts = dict.fromkeys(names), dict.fromkeys(names, 0)
    text = set(language_model_linears(model))
    linears, handles = named_linears(model), []
    current = {}

    def make(name):
        def hook(module, args):
            x = args[0].double()
            if name in text:
                x = x.reshape(*current["mask"].shape, -1)[current["mask"]]
            x = x.reshape(-1, x.shape[-1])
            sums[name] = x.T @ x if sums[name] is None else sums[name] + x.T @ x
            counts[name] += len(x)

        return hook

    for name in names:
        handles.append(linears[name].register_forward_pre_hook(make(name)))
    with torch.no_grad():
        for batch in batches:
            current["mask"] = batch["attention_mask"].bool()
            model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    return sums, counts


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_float64_hook_on_every_module_of_a_padded_multi_image_batch(kind):
    model, batches = MODELS[kind](), make_batches(kind, 3)
    names = [name for name, module in named_linears(model).items() if module is not model.get_output_embeddings()]
    cov = capture_covariance(model, batches, targets=names, buffer_rows=50, dtype=torch.float64)
    sums, counts = hook_oracle(model, batches, names)
    assert set(cov.modules) == set(names)
    for name in names:
        torch.testing.assert_close(cov[name], sums[name], rtol=1e-12, atol=1e-12 * float(sums[name].abs().max()))
        assert cov.tokens(name) == counts[name]
    single = capture_covariance(model, batches, targets=names)
    for name in names:
        assert single[name].dtype == torch.float32
        torch.testing.assert_close(single[name].double(), sums[name], rtol=1e-5, atol=1e-5 * float(sums[name].max()))
        assert torch.equal(single[name], single[name].mT)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_read_one_input_share_one_matrix(kind):
    model, batches = MODELS[kind](), make_batches(kind, 2)
    cov = capture_covariance(model, batches)
    assert [len(group.modules) for group in cov.groups] == [3, 1, 2, 1] * 2
    leaves = [module.rpartition(".")[2] for module in cov.groups[0].modules]
    assert leaves == ["q_proj", "k_proj", "v_proj"]
    alone = capture_covariance(model, batches, share_inputs=False)
    assert len(alone.groups) == len(cov.modules) == 14
    for module in cov.modules:
        assert torch.equal(cov[module], alone[module])


def test_default_targets_leave_vision_tower_projector_and_head_out():
    cov = capture_covariance(MODELS["llava"](), make_batches("llava", 1))
    assert cov.modules and all("language_model" in name and "lm_head" not in name for name in cov.modules)


def test_vision_modules_named_explicitly_count_every_row():
    model, batch = MODELS["llava"](), make_batch("llava")
    cov = capture_covariance(model, [batch], targets=r".*multi_modal_projector\.linear_1")
    (module,) = cov.modules
    assert cov.tokens(module) == 4 * 4  # four images of four patches


def test_output_head_named_explicitly_counts_every_kept_token():
    model, batch = MODELS["llama"](), make_batch("llama")
    cov = capture_covariance(model, [batch], targets=["lm_head"])
    assert cov.tokens("lm_head") == int(batch["attention_mask"].sum())


def test_a_batch_may_say_what_the_capture_would_say():
    model, batch = MODELS["llama"](), make_batch("llama")
    cov = capture_covariance(model, [{**batch, "use_cache": True, "logits_to_keep": 0}])
    assert torch.equal(cov["model.layers.0.self_attn.q_proj"], capture_covariance(model, [batch])[cov.modules[0]])


def test_transformers_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    batches = make_batches("llama", 2)
    cov = capture_covariance(model, batches)
    sums, _ = hook_oracle(model, batches, list(cov.modules))
    assert len(cov.modules) == 4
    for name in cov.modules:
        torch.testing.assert_close(cov[name].double(), sums[name], rtol=1e-5, atol=1e-4)


def test_an_adapted_model_gives_the_covariances_under_the_base_names():
    from peft import LoraConfig, get_peft_model

    batches = make_batches("llama", 2)
    plain = capture_covariance(MODELS["llama"](), batches)
    adapted = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    cov = capture_covariance(adapted, batches)
    assert cov.modules == plain.modules and cov.fingerprint == plain.fingerprint
    assert [group.modules for group in cov.groups] == [group.modules for group in plain.groups]
    for name in cov.modules:
        assert torch.equal(cov[name], plain[name])


def test_bfloat16_model():
    model, batches = MODELS["llama"]().to(torch.bfloat16), make_batches("llama", 2)
    cov = capture_covariance(model, batches)
    sums, _ = hook_oracle(model, batches, list(cov.modules))
    for name in cov.modules:
        torch.testing.assert_close(cov[name].double(), sums[name], rtol=1e-5, atol=1e-5 * float(sums[name].max()))


def test_other_hooks_and_training_flags_are_left_alone():
    model, calls = MODELS["llama"](), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: calls.append(1))
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    capture_covariance(model, make_batches("llama", 2))
    assert len(calls) == 2 and len(layer._forward_pre_hooks) == 1
    assert flags == [module.training for module in model.modules()]
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_hooks_are_removed_and_flags_restored_after_an_error():
    model = MODELS["llama"]().train()
    with pytest.raises(IndexError):
        capture_covariance(model, [{"input_ids": torch.tensor([[5, 10**6]])}])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
@pytest.mark.parametrize("kind", ["packed", "square"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "placed late"])
@pytest.mark.parametrize("zeroes", [False, True], ids=["masked", "zeroed, as on a GPU"])
def test_the_token_buffer_changes_nothing_and_ignores_what_padding_holds(chunk, kind, late, zeroes):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 200, 9), torch.rand(2, 200) > 0.3
    x[~mask] = float("nan")
    storage, cpu = Storage(kind, torch.float64), torch.device("cpu")
    pair = [Accumulator(9, cpu, storage, buffer_rows=64) for _ in range(2)]
    for accumulator in pair:
        accumulator._zeroes = zeroes
    for start in range(0, 200, chunk):
        if not late or start > 100:
            for accumulator in pair:
                accumulator.place()
        for accumulator, rows, keep in zip(pair, x, mask):
            part = keep[start : start + chunk]
            accumulator.add(Rows(rows[start : start + chunk], part, int(part.sum())))
    for accumulator, rows, keep in zip(pair, x, mask):
        accumulator.flush()
        kept = rows[keep].double()
        torch.testing.assert_close(accumulator.place().full(), kept.T @ kept)
        assert accumulator.tokens() == int(keep.sum()) and accumulator.is_finite()


def test_a_module_with_a_non_finite_input_is_named_first_come_first():
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(KoreError, match=r"layers\.0\.mlp\.gate_proj: its input holds NaN or infinity"):
        capture_covariance(model, make_batches("llama", 1))


def test_a_target_that_never_runs_is_named():
    model = MODELS["llava"]()
    text = [{"input_ids": torch.randint(20, 300, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}]
    with pytest.raises(KoreError, match=r"projector\.linear_1: the model never ran this module on .* \(2 such"):
        capture_covariance(model, text, targets=["linear_1", "linear_2", "gate_proj"])


class Switching(nn.Module):
    """Two layers that read one tensor in the first call and different ones, or only one of them, later."""

    def __init__(self, later: str) -> None:
        super().__init__()
        self.a, self.b, self.later, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), later, 0

    def forward(self, input_ids):
        self.calls += 1
        x = input_ids
        if self.calls == 1 or self.later == "same":
            return self.a(x) + self.b(x)
        if self.later == "skip":
            return self.a(x)
        if self.later == "in_place":
            first, x = self.a(x), x.mul_(2)
            return first + self.b(x)
        return self.a(x) + self.b(x * 2)


@pytest.mark.parametrize("later", ["other", "skip", "in_place"])
def test_members_that_stop_sharing_are_an_error_and_share_inputs_false_handles_them(later):
    batches = [{"input_ids": torch.randn(2, 3, 4)} for _ in range(2)]
    copies = [{"input_ids": batch["input_ids"].clone()} for batch in batches]
    with pytest.raises(KoreError, match="share_inputs=False"):
        capture_covariance(Switching(later), batches)
    cov = capture_covariance(Switching(later), copies, share_inputs=False, dtype=torch.float64)
    assert len(cov.groups) == 2
    if later == "skip":
        assert cov.tokens("b") == 6 and cov.tokens("a") == 12


class Looping(nn.Module):
    """Two layers that share an input and run several times in one pass, the second time on one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        for x in (input_ids, input_ids + 1, input_ids + 1):
            self.a(x), self.b(x)
        return self.a(input_ids) + self.b(input_ids)


def test_a_module_that_runs_several_times_counts_every_time():
    x = torch.randn(2, 3, 4)
    cov = capture_covariance(Looping(), [{"input_ids": x}] * 2, dtype=torch.float64)
    both = torch.cat([x, x + 1, x + 1, x]).reshape(-1, 4).double()
    assert [group.modules for group in cov.groups] == [("a", "b")] and cov.tokens("a") == 2 * len(both)
    torch.testing.assert_close(cov["b"], 2 * both.T @ both)


def test_padding_that_cannot_be_lined_up_with_the_rows_is_an_error():
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.a(input_ids.reshape(-1, 4)[:5])

    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(KoreError, match="not every one of the batch's"):
        capture_covariance(Packing(), [{"input_ids": torch.randn(2, 3, 4), "attention_mask": mask}])
    cov = capture_covariance(Packing(), [{"input_ids": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 3)}])
    assert cov.tokens("a") == 5


def test_official_scaling_divides_each_sample_by_the_absolute_value_of_its_signed_maximum():
    x = torch.tensor([[[1.0, -8.0], [2.0, 4.0], [99.0, 99.0]], [[-3.0, -6.0], [-9.0, -12.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    index = mask.reshape(-1).nonzero().squeeze(1)
    (scaled,) = counted_rows(x, Selection((2, 3), mask, index, 4), "layer", scale=True)
    torch.testing.assert_close(scaled.x, torch.cat([x[0, :2] / 4, x[1, :2] / 3]))
    (on_device,) = counted_rows(x, Selection((2, 3), mask, None, 4), "layer", scale=True)
    assert scaled.count == 4 and torch.equal(on_device.x[on_device.mask], scaled.x)
    (zeros,) = counted_rows(torch.zeros(2, 3, 2), Selection((2, 3), mask, index, 4), "layer", scale=True)
    assert not zeros.x.any()


@pytest.mark.parametrize("kind", ["all", "index", "mask", "a sample without a row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_samples_are_scaled_in_the_sum_not_row_by_row(monkeypatch, kind, dtype):
    monkeypatch.setattr(capture_rows, "LONG_SAMPLE", 3)
    x, mask = torch.randn(3, 12, 5).to(dtype), torch.rand(3, 12) > 0.2
    if kind == "a sample without a row":
        mask[1] = False
    index, count = mask.reshape(-1).nonzero().squeeze(1), int(mask.sum())
    selection = {
        "all": Selection((3, 12)),
        "mask": Selection((3, 12), mask, None, mask.sum()),
    }.get(kind, Selection((3, 12), mask, index, count))
    x[~mask] = 0.0 if kind == "all" else torch.nan
    parts = counted_rows(x, selection, "layer", scale=True)
    (scaled,) = counted_rows(x, selection, "layer", scale=True, by_sample=False)
    assert len(parts) == 3 and all(part.x.dtype == dtype for part in parts) and scaled.x.dtype == torch.float32
    assert sum(int(part.count) for part in parts) == int(scaled.count) == (36 if kind == "all" else count)
    sums = []
    for given in (parts, [scaled]):
        accumulator = Accumulator(5, torch.device("cpu"), Storage("packed", torch.float64), buffer_rows=8)
        for number, rows in enumerate(given):
            accumulator.add(rows)
            rows.x.zero_()
            if number:
                accumulator.place()
        accumulator.place()
        accumulator.flush()
        sums.append(accumulator.place().full())
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("long", [1, 256])
@pytest.mark.parametrize("storage", ["packed", "square"])
def test_official_capture_equals_a_loop_over_samples(monkeypatch, long, storage):
    monkeypatch.setattr(capture_rows, "LONG_SAMPLE", long)
    model, batch = MODELS["llama"](), make_batch("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    cov = capture_covariance(model, [batch], targets=names, normalize="official", dtype=torch.float64, storage=storage)
    for name in names:
        inputs = []
        handle = named_linears(model)[name].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))  # noqa: B023
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        expected = torch.zeros_like(cov[name])
        for x, keep in zip(inputs[0], batch["attention_mask"].bool()):
            x = x[keep] / x[keep].max().abs()
            expected += x.double().T @ x.double()
        torch.testing.assert_close(cov[name], expected)
    assert cov.normalize == "official"


@pytest.mark.parametrize("stream", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("stop", [0, 2, 3, 5])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, stream, stop):
    model, batches = MODELS["llama"](), make_batches("llama", 5)
    whole = capture_covariance(model, stream(batches), checkpoint=tmp_path / "a", checkpoint_every=2)

    def cut():
        yield from batches[:stop]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_covariance(model, cut(), checkpoint=tmp_path / "b", checkpoint_every=2)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    continued = capture_covariance(model, stream(batches), checkpoint=tmp_path / "b", checkpoint_every=2)
    assert len(calls) == 5 - stop // 2 * 2
    assert continued.groups == whole.groups
    assert all(torch.equal(continued[name], whole[name]) for name in whole.modules)
    calls.clear()
    again = capture_covariance(model, stream(batches), checkpoint=tmp_path / "b", checkpoint_every=2)
    assert not calls and all(torch.equal(again[name], whole[name]) for name in whole.modules)


def test_a_checkpoint_of_another_call_is_refused(tmp_path):
    model, batches = MODELS["llama"](), make_batches("llama", 3)
    capture_covariance(model, batches, checkpoint=tmp_path / "c", checkpoint_every=2)
    with pytest.raises(KoreError, match="another normalize"):
        capture_covariance(model, batches, normalize="official", checkpoint=tmp_path / "c", checkpoint_every=2)
    with pytest.raises(KoreError, match="another fingerprint"):
        capture_covariance(MODELS["llama"](1), batches, checkpoint=tmp_path / "c", checkpoint_every=2)
    with pytest.raises(KoreError, match="other batches"):
        capture_covariance(model, batches[::-1], checkpoint=tmp_path / "c", checkpoint_every=2)
    with pytest.raises(KoreError, match="only 2 were given"):
        capture_covariance(model, batches[:2], checkpoint=tmp_path / "c", checkpoint_every=2)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="found other files"):
        capture_covariance(model, batches, checkpoint=tmp_path / "d")


KILLED = """
    import os, signal, sys
    import torch
    from kore.capture import capture_covariance
    from tests.batches import MODELS, make_batches

    class Batches:
        passes = 0

        def __init__(self, last):
            self.last = last

        def __iter__(self):
            self.passes += 1
            for index, batch in enumerate(make_batches("llama", 6)):
                if index == 3 and self.passes == self.last:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    torch.set_num_threads(int(sys.argv[2]))
    if os.fork() == 0:
        capture_covariance(MODELS["llama"](), Batches(1), checkpoint=sys.argv[1] + "/one", checkpoint_every=2)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    budget = dict(memory_budget="100kb", buffer_rows=64)
    capture_covariance(MODELS["llama"](), Batches(3), checkpoint=sys.argv[1] + "/several", checkpoint_every=2, **budget)
"""


@pytest.mark.slow
def test_kill_9_during_capture(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "killed"), str(torch.get_num_threads())]
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    batches, forwards = make_batches("llama", 6), []
    model = MODELS["llama"]()
    model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    budget = {"memory_budget": "100kb", "buffer_rows": 64}
    for name, options, left in (("one", {}, 4), ("several", budget, 1 + 4 + 6)):
        forwards.clear()
        killed = tmp_path / "killed" / name
        continued = capture_covariance(model, batches, checkpoint=killed, checkpoint_every=2, **options)
        assert len(forwards) == left
        whole = capture_covariance(model, batches, checkpoint=tmp_path / name, checkpoint_every=2, **options)
        assert continued.groups == whole.groups
        assert all(torch.equal(continued[name], whole[name]) for name in whole.modules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalize": "max"}, "normalize: expected one of none, official"),
        ({"dtype": torch.bfloat16}, "dtype: expected torch.float32"),
        ({"batches": []}, "at least one batch"),
        ({"batches": [torch.ones(2)]}, "batch 0: expected a dictionary"),
        ({"batches": [{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 1, 2, 2)}]}, "attention_"),
        ({"buffer_rows": 0}, "at least 1"),
        ({"targets": ["q_prj"]}, "q_proj"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(KoreError, match=message):
        capture_covariance(MODELS["llama"](), **{"batches": make_batches("llama", 1), **arguments})
