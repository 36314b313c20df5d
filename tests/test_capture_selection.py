"""Which tokens count: prompts, answers, images, text."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from kore.capture import capture_covariance
from kore.capture.selection import TOKENS, Selector
from kore.errors import KoreError
from kore.models import language_model_linears, named_linears
from tests.batches import KINDS, MODELS, make_batch, make_batches
from tests.tiny import TOKEN

capture = functools.partial(capture_covariance, progress=False, dtype=torch.float64)


def labelled(kind: str, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches whose last eight tokens of each row are an answer."""
    batches = make_batches(kind, count)
    for batch in batches:
        batch["labels"][:, :-8] = -100
        batch["labels"][batch["attention_mask"] == 0] = -100
    return batches


def kept(batch: dict[str, torch.Tensor], tokens: str) -> torch.Tensor:
    """The counted positions, said in another way than the library does."""
    keep = batch["attention_mask"].bool()
    answer = torch.zeros_like(keep)
    answer[:, -8:] = True
    image = torch.isin(batch["input_ids"], torch.tensor([TOKEN["<image>"], TOKEN["<|image_pad|>"]]))
    rules = {"all": keep, "prompt": ~answer, "answer": answer, "image": image, "text": ~image}
    return keep & rules[tokens]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_a_plain_hook_that_indexes_the_rows(kind, tokens):
    model, batches = MODELS[kind](), labelled(kind)
    names = [name for name in language_model_linears(model) if name.endswith(("1.self_attn.q_proj", "1.mlp.down_proj"))]
    if (kind, tokens) == ("llama", "image"):
        with pytest.raises(KoreError, match="LlamaForCausalLM names no image token"):
            capture(model, batches, targets=names, tokens=tokens)
        return
    cov = capture(model, batches, targets=names, tokens=tokens)
    for name in names:
        inputs: list[torch.Tensor] = []
        handle = named_linears(model)[name].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))  # noqa: B023
        with torch.no_grad():
            for batch in batches:
                model(**{key: value for key, value in batch.items() if key != "labels"})
        handle.remove()
        x = torch.cat([rows[kept(batch, tokens)] for rows, batch in zip(inputs, batches)]).double()
        torch.testing.assert_close(cov[name], x.T @ x, rtol=1e-12, atol=1e-12)
        assert cov.tokens(name) == len(x) > 0
    assert cov.selection == tokens


def test_prompt_and_answer_and_image_and_text_split_all_tokens():
    model, batches = MODELS["llava"](), labelled("llava")
    parts = {tokens: capture(model, batches, tokens=tokens) for tokens in TOKENS}
    name = parts["all"].modules[-1]
    for one, other in (("prompt", "answer"), ("image", "text")):
        torch.testing.assert_close(parts[one][name] + parts[other][name], parts["all"][name])
        assert parts[one].tokens(name) + parts[other].tokens(name) == parts["all"].tokens(name)


def test_official_scaling_divides_by_the_maximum_of_the_counted_rows():
    model, batch = MODELS["llama"](), labelled("llama", 1)[0]
    name = "model.layers.1.mlp.down_proj"
    cov = capture(model, [batch], targets=[name], tokens="answer", normalize="official")
    inputs: list[torch.Tensor] = []
    handle = named_linears(model)[name].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    scaled = [x[keep] / x[keep].max().abs() for x, keep in zip(inputs[0], kept(batch, "answer")) if keep.any()]
    x = torch.cat(scaled).double()
    torch.testing.assert_close(cov[name], x.T @ x)


class Configured(nn.Module):
    config = type("Config", (), {"image_token_id": 4, "video_token_id": 8})()


def test_a_batch_on_a_device_gives_a_mask_and_a_count_that_stay_there():
    """The meta device raises where anything asks for a value."""
    ids = torch.tensor([[4, 9, 8, 0]])
    on_cpu = Selector("image", Configured()).select({"input_ids": ids, "attention_mask": ids != 0}, 0)
    assert on_cpu.count == 2 and on_cpu.index.tolist() == [0, 2]
    batch = {"input_ids": ids.to("meta"), "attention_mask": ids.to("meta"), "labels": ids.to("meta")}
    for tokens in TOKENS:
        there = Selector(tokens, Configured()).select(batch, 0)
        assert there.index is None and there.keep.is_meta and there.count.is_meta and there.shape == (1, 4)


def test_nothing_is_selected_where_everything_counts():
    batch = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3)}
    selection = Selector("all", Configured()).select(batch, 0)
    assert selection.keep is None and selection.shape == (2, 3)


@pytest.mark.parametrize(
    ("tokens", "drop", "message"),
    [
        ("prompt", "labels", r"batch 0: tokens='prompt' needs labels \(batch, tokens\)"),
        ("answer", "labels", "batch 0: tokens='answer' needs labels"),
        ("answers", None, "tokens: expected one of all, prompt, image, text, answer, got 'answers'"),
    ],
)
def test_what_a_selection_needs_is_said(tokens, drop, message):
    batch = make_batch("llama")
    batch.pop(drop, None)
    with pytest.raises(KoreError, match=message):
        capture(MODELS["llama"](), [batch], tokens=tokens)


def test_embeddings_in_place_of_ids_cannot_tell_images():
    with pytest.raises(KoreError, match="batch 7: tokens='text' needs input_ids"):
        Selector("text", Configured()).select({"inputs_embeds": torch.ones(1, 2, 4)}, 7)


def test_labels_of_another_shape_are_an_error():
    batch = {"attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 4)}
    with pytest.raises(KoreError, match=r"batch 3: .*different shapes, for example \(2, 3\) and \(2, 4\)"):
        Selector("answer", Configured()).select(batch, 3)


def test_data_without_such_a_token_is_an_error():
    text = {"input_ids": torch.randint(20, 300, (2, 8))}
    with pytest.raises(KoreError, match=r"tokens='image': the batches hold no such token"):
        capture(MODELS["llava"](), [text], tokens="image", targets=["gate_proj"])


def test_modules_outside_the_language_model_have_no_tokens_to_choose():
    with pytest.raises(KoreError, match=r"multi_modal_projector\.linear_1 is not in it \(1 such targets\)"):
        capture(MODELS["llava"](), labelled("llava"), targets=["linear_1"], tokens="image")
