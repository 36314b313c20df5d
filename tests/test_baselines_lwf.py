"""LwF: the term and its gradient, and that the teacher is the untouched model whatever was trained."""

from __future__ import annotations

import pytest
import torch

from kore.baselines import baseline, prepare_model
from kore.errors import ConfigError
from kore.penalty import Forward
from kore.protection.distillation import Distillation, divergence
from kore.training.trainer import forward, selects_logits
from tests.batches import KINDS, MODELS, make_batch


def moved(kind, scale=0.05):
    """A LoRA model in float64 whose factors and projector are away from their start."""
    model = prepare_model(MODELS[kind]().double(), "lwf", rank=4)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(scale * noise)
    return model.train()


def labelled_batch(kind, seed=0):
    """Answers are the last third of each row; padding and the rest have no label."""
    batch = make_batch(kind, seed)
    batch["labels"][:, :16] = -100
    batch["labels"][batch["attention_mask"] == 0] = -100
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    return batch


def passed(model, batch):
    return forward(model, batch, selects_logits(model))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_the_term_is_autograd_s_and_its_gradient_the_difference_of_both(temperature):
    generator = torch.Generator().manual_seed(0)
    new, old = (3 * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    new.requires_grad_()
    q, p = (logits / temperature for logits in (new, old))
    wanted = temperature**2 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    value = divergence(new, old, temperature)
    torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
    (by_autograd,) = torch.autograd.grad(wanted, new)
    (gradient,) = torch.autograd.grad(value * 3, new)
    torch.testing.assert_close(gradient, 3 * by_autograd, rtol=0, atol=1e-14)
    exact = temperature * ((new / temperature).softmax(-1) - (old / temperature).softmax(-1))
    torch.testing.assert_close(gradient, 3 * exact.detach(), rtol=0, atol=1e-14)


def test_half_precision_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(4, 1000, generator=generator).to(torch.bfloat16) for _ in range(2))
    value = divergence(new.requires_grad_(), old, 2.0)
    exact = divergence(new.double(), old.double(), 2.0)
    assert value.dtype == torch.float32 and float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    value.backward()
    assert new.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_term_and_gradient_are_zero_at_the_start(kind):
    """To the bit, in the arithmetic of training."""
    model = prepare_model(MODELS[kind](), "lwf", rank=4).train()
    batch = make_batch(kind)
    term = Distillation(model, 3.0, 2.0).batch(passed(model, batch))
    assert float(term.detach()) == 0
    term.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_untouched_model_to_the_bit(kind):
    model, batch = moved(kind), labelled_batch(kind)
    model.base_model.model.eval()  # some part that someone has put into evaluation mode stays there
    model.get_output_embeddings().train()
    modes = [module.training for module in model.modules()]
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    student = passed(model, batch)
    state = torch.get_rng_state()
    teacher = Distillation(model, 1.0, 2.0).teacher(student)
    assert torch.equal(state, torch.get_rng_state()) and not teacher.requires_grad
    wanted = passed(MODELS[kind]().double(), batch).logits
    assert torch.equal(teacher, wanted) and (student.logits - wanted).abs().max() > 1e-3
    assert modes == [module.training for module in model.modules()]
    assert flags == [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert torch.equal(passed(model, batch).logits, student.logits), "the adapter must be on again"


def test_the_teacher_has_no_dropout_and_every_position_where_the_model_cannot_choose():
    model, batch = moved("llama"), labelled_batch("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, args, x: torch.dropout(x, 0.5, module.training))
    student = forward(model, batch, False)
    teacher = Distillation(model, 1.0, 2.0).teacher(student)
    assert torch.equal(teacher, forward(MODELS["llama"]().double(), batch, False).logits)
    assert not torch.equal(student.logits, forward(model.eval(), batch, False).logits), "the student has it"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_parameters_are_those_of_the_formula(kind):
    model, batch = moved(kind), labelled_batch(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    one = passed(model, batch)
    term = Distillation(model, 2.5, 3.0).batch(one)
    gradients = torch.autograd.grad(term, trained)
    untouched, inputs = MODELS[kind]().double(), {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        old = untouched(**inputs).logits
    new = model(**inputs).logits
    wanted, count = 0.0, 0
    for row in range(3):  # the token at t is predicted at t − 1
        for t in range(1, batch["labels"].shape[1]):
            if batch["labels"][row, t] != -100:
                p, q = (logits[row, t - 1].div(3.0).log_softmax(-1) for logits in (old, new))
                wanted, count = wanted + 9.0 * (p.exp() * (p - q)).sum(), count + 1
    assert count == int(one.count) == 8 + 3 + 8
    torch.testing.assert_close(term, 2.5 * wanted / count, rtol=1e-11, atol=0)
    for gradient, other in zip(gradients, torch.autograd.grad(2.5 * wanted / count, trained), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def test_padding_and_prompt_positions_do_not_count():
    model, batch = moved("llama"), labelled_batch("llama")
    penalty = Distillation(model, 1.0, 2.0)
    one = passed(model, batch)
    noise = torch.randn(one.logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = one.logits.detach() + noise * ~one.labelled[..., None]
    other = Forward(one.inputs, one.outputs, logits.requires_grad_(), one.targets, one.count)
    term = penalty.batch(other)
    torch.testing.assert_close(term, penalty.batch(one), rtol=0, atol=0)
    term.backward()
    assert not logits.grad[~one.labelled].any() and logits.grad[one.labelled].abs().amax(-1).min() > 0


def test_what_is_wrong_is_said():
    with pytest.raises(ConfigError, match="expected a model with an adapter to switch off, got LlamaForCausalLM"):
        baseline("lwf").penalty(MODELS["llama"](), None)
    for options, words in (({"temperature": 0}, "greater than 0"), ({"strength": -1}, "greater than or equal to 0")):
        with pytest.raises(ConfigError, match=rf"options.{next(iter(options))}: .*{words}"):
            baseline("lwf", **options)
