"""Output gradients: their covariance against autograd, in float64; labels, padding, resume, memory."""

from __future__ import annotations

import pytest
import torch

import kore.capture.gradients as gradients
from kore.capture import capture_output_gradients
from kore.capture.gradients import loss_gradient
from kore.covariance import OutputGradients, load_covariance, load_output_gradients, merge_covariance
from kore.errors import ArtifactError, KoreError
from kore.models import named_linears
from tests.batches import KINDS, MODELS, make_batches


def capture(model, batches, **options):
    return capture_output_gradients(model, batches, progress=False, **{"dtype": torch.float64, **options})


def expected(model, batches, names, labels):
    """Σ gᵀg by autograd through offsets that are added to the outputs; ``labels`` of all losses in order."""
    linears, sums = named_linears(model), {}
    labels = iter(labels)
    offsets, handles = {}, []

    def add_offset(name):
        def hook(module, args, y):
            offsets[name] = torch.zeros_like(y, requires_grad=True)
            return y + offsets[name]

        return hook

    for batch in batches:
        for name in names:
            handles.append(linears[name].register_forward_hook(add_offset(name)))
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        loss = 0.0
        for row in range(len(logits)):
            where, drawn = next(labels)
            loss = loss + torch.nn.functional.cross_entropy(logits[row][where], drawn, reduction="sum")
        loss.backward()
        keep = batch["attention_mask"].bool().reshape(-1)
        for handle in handles:
            handle.remove()
        for name in names:
            g = offsets[name].grad.reshape(-1, offsets[name].shape[-1])[keep]
            sums[name] = sums.get(name, 0) + g.T @ g
    return sums


def predicted(batch, tokens, image):
    """By a loop: the positions of each sample from which a loss is taken."""
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        where = []
        for t in range(len(ids)):
            last = t + 1 == len(ids)
            follows = {
                "all": True,
                "text": last or int(ids[t + 1]) not in image,
                "answer": not last and int(labels[t + 1]) != -100,
            }[tokens]
            if mask[t] and follows:
                where.append(t)
        rows.append(torch.tensor(where))
    return rows


@pytest.mark.parametrize("tokens", ["text", "all", "answer"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_that_autograd_gives(kind, tokens, monkeypatch):
    model, batches = MODELS[kind]().double(), make_batches(kind, 2)
    for batch in batches:
        batch["labels"][:, :15] = -100
        batch["labels"][batch["attention_mask"] == 0] = -100
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].double()
    drawn = []

    def recorded(logits, generator):
        gradient = loss_gradient(logits, generator)
        drawn.append(gradient.argmin(-1))
        return gradient

    monkeypatch.setattr(gradients, "loss_gradient", recorded)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    G = capture(model, batches, tokens=tokens, buffer_rows=16)
    config = model.config
    image = {getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")}
    places = [where for batch in batches for where in predicted(batch, tokens, image)]
    assert [len(where) for where in places] == [len(labels) for labels in drawn]
    wanted = expected(model, batches, G.modules, zip(places, drawn))
    for name in G.modules:
        torch.testing.assert_close(G[name], wanted[name], rtol=1e-9, atol=1e-12 * float(wanted[name].norm()))
        assert G[name].shape[0] == named_linears(model)[name].weight.shape[0] == G.group(name).dim
        assert G.tokens(name) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert len(G.groups) == len(G.modules) == 14 and G.selection == tokens
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(named_linears(model)[name]._forward_hooks for name in G.modules)


def test_labels_are_drawn_from_the_model():
    torch.manual_seed(0)
    logits = torch.randn(1, 6, dtype=torch.float64).repeat(200_000, 1)
    gradient = loss_gradient(logits.clone(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(logits), dtype=torch.float64), atol=1e-12, rtol=0)
    frequency = torch.bincount((gradient < 0).double().argmax(-1), minlength=6) / len(logits)
    torch.testing.assert_close(frequency.double(), logits[0].softmax(-1), atol=4e-3, rtol=0)
    masked = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).repeat(2000, 1)
    drawn = loss_gradient(masked, torch.Generator().manual_seed(2)).argmin(-1)
    assert set(drawn.tolist()) == {0, 2}


def test_what_a_padded_row_holds_does_not_matter_and_the_seed_does():
    model, batches = MODELS["llama"]().double(), make_batches("llama", 1)
    G = capture(model, batches)
    batches[0]["input_ids"][batches[0]["attention_mask"] == 0] = 77
    name = G.modules[3]
    assert torch.equal(capture(model, batches)[name], G[name])
    assert not torch.allclose(capture(model, batches, seed=1)[name], G[name])


def test_several_passes_and_a_stopped_run_give_the_same(tmp_path):
    model, batches = MODELS["llava"](), make_batches("llava", 4)
    whole = capture(model, batches, checkpoint=tmp_path / "whole", checkpoint_every=2)
    windows = capture(model, batches, memory_budget="800KiB")

    class Stop(Exception):
        pass

    def stopping():
        yield from batches[:3]
        raise Stop

    with pytest.raises(Stop):
        capture(model, stopping(), checkpoint=tmp_path / "c", checkpoint_every=2)
    resumed = capture(model, batches, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert isinstance(windows, OutputGradients)
    for name in whole.modules:
        assert torch.equal(resumed[name], whole[name])
        torch.testing.assert_close(windows[name], whole[name])
    with pytest.raises(KoreError, match="another seed"):
        capture(model, batches, checkpoint=tmp_path / "c", checkpoint_every=2, seed=1)


def test_the_plan_names_d_out(caplog):
    model, batches = MODELS["llama"](), make_batches("llama", 1)
    with caplog.at_level("INFO", "kore"):
        capture(model, batches, memory_budget="1MiB")
    assert "output gradients of 14 layers; packed float64 matrices" in caplog.text


def test_a_saved_one_is_told_from_a_covariance(tmp_path):
    model, batches = MODELS["llama"](), make_batches("llama", 1)
    G = capture(model, batches)
    G.save(tmp_path / "g")
    loaded = load_output_gradients(tmp_path / "g")
    assert loaded.groups == G.groups and torch.equal(loaded[G.modules[0]], G[G.modules[0]])
    with pytest.raises(ArtifactError, match="'covariance', found 'output gradients'"):
        load_covariance(tmp_path / "g")
    both = merge_covariance([G, loaded])
    assert isinstance(both, OutputGradients)
    torch.testing.assert_close(both[G.modules[0]], 2 * G[G.modules[0]])
    with pytest.raises(KoreError, match="set 0 holds output gradients, set 1 covariance"):
        merge_covariance([G, kore_covariance(model, batches)])


def kore_covariance(model, batches):
    from kore.capture import capture_covariance

    return capture_covariance(model, batches, progress=False, dtype=torch.float64)


def test_adapters_and_training_modes_are_left_as_they_were():
    from peft import LoraConfig, get_peft_model

    plain, batches = MODELS["llama"]().double(), make_batches("llama", 1)
    G = capture(plain, batches)
    adapted = get_peft_model(
        MODELS["llama"]().double(), LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
    ).train()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    again = capture(adapted, batches)
    assert all(torch.allclose(again[name], G[name], rtol=1e-10) for name in G.modules)
    assert adapted.training and all(parameter.grad is None for parameter in adapted.parameters())
    assert trained == [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]


def test_what_is_wrong_is_said():
    model, batches = MODELS["llama"](), make_batches("llama", 1)
    with pytest.raises(KoreError, match="tokens: expected one of all, text, answer, got 'prompt'"):
        capture(model, batches, tokens="prompt")
    with pytest.raises(KoreError, match="at least one batch"):
        capture(model, [])
    broken = MODELS["llama"]()
    broken.lm_head.weight.data[0] = torch.nan
    with pytest.raises(KoreError, match=r"layers\.1\.mlp\.down_proj: its output gradient holds NaN"):
        capture(broken, batches)
