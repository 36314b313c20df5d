"""Whole training steps of one model adapted in different ways: checked, timed in turn, with what they hold."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kore.bench.check import PEER_TOLERANCE, allowed_error, check, difference
from kore.bench.machine import made_with, name_of
from kore.bench.memory import peak_bytes, saved_bytes
from kore.bench.step_peers import FROZEN, LIGER, OURS, LlamaShape, Trained, builders, no_liger, peft_name, random_llama
from kore.bench.timing import Clock, in_turn, ratio, summary

Batch = Mapping[str, Tensor]
Results = dict[str, Tensor]

_TWO_BYTE_TOLERANCE = 1e-1
_PARTS = ("forward", "backward", "optimizer")


def text_batch(vocabulary: int, count: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random text of which every token is a target."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Plan:
    """What :func:`run` measures: a random Llama, one text of ``tokens``, and the ranks of :func:`measure`."""

    shape: LlamaShape
    tokens: int
    rank: int
    lora_rank: int
    dtype: torch.dtype
    rounds: int


def run(plan: Plan, device: torch.device, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Steps of a random decoder stack, for JSON. Arguments and errors as for :func:`measure`."""
    base = random_llama(plan.shape, device, plan.dtype)
    batch = text_batch(plan.shape.vocabulary, 1, plan.tokens, device)
    found = measure(base, batch, Clock(device), plan.rank, plan.lora_rank, plan.rounds, say=say)
    return {**made_with("lora_fa_linears", device), "shape": asdict(plan.shape), **found}


class Step:
    """One contender with its optimizer; the frozen model has none and stops at the gradient of its inputs."""

    def __init__(self, trained: Trained, batch: Batch) -> None:
        self.trained, self._batch = trained, batch
        parameters = trained.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0) if parameters else None
        self._loss: Tensor | None = None

    def forward(self) -> None:
        self._loss = self.trained.model(**self._batch, use_cache=False).loss

    def backward(self) -> None:
        assert self._loss is not None
        self._loss.backward()

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Drop the graph and the gradients."""
        self._loss = self.trained.inputs = None
        for parameter in self.trained.parameters():
            parameter.grad = None

    def __call__(self) -> None:
        self.forward()
        self.backward()
        self.update()

    def resident_bytes(self) -> int:
        """Parameters, buffers and the optimizer's state."""
        held = [*self.trained.model.parameters(), *self.trained.model.buffers()]
        if self.optimizer is not None:
            held += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def results_of(trained: Trained, batch: Batch) -> Results:
    """The loss, the gradient of the embedded tokens, and that of every B, in one vector; leaves no gradient behind."""
    loss = trained.model(**batch, use_cache=False).loss
    loss.backward()
    assert trained.inputs is not None and trained.inputs.grad is not None
    found = {"loss": loss.detach(), "dx": trained.inputs.grad}
    if trained.Bs:
        gradients = [B.grad for B in trained.Bs.values() if B.grad is not None]
        if len(gradients) < len(trained.Bs):
            raise RuntimeError(f"{len(trained.Bs) - len(gradients)} B have no gradient")
        found["dB"] = torch.cat([gradient.flatten() for gradient in gradients])
    trained.inputs = None
    for parameter in trained.model.parameters():
        parameter.grad = None
    return found


def exact_results(trained: Trained, batch: Batch, wide: torch.dtype = torch.float64) -> Results:
    """Those of a ``wide`` copy of an unfused model; transformers makes the loss itself of float32 logits."""
    twin: Any = copy.deepcopy(trained.model).to(wide)
    names = {id(parameter): name for name, parameter in trained.model.named_parameters()}
    parameters = dict(twin.named_parameters())
    Bs = {name: parameters[names[id(B)]] for name, B in trained.Bs.items()}
    wider = {key: value.to(wide) if value.is_floating_point() else value for key, value in batch.items()}
    return results_of(Trained(twin, Bs), wider)


def checked(
    base: nn.Module,
    batch: Batch,
    rank: int,
    lora_rank: int,
    wide: torch.dtype = torch.float64,
    texts: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Step], dict[str, dict[str, float]], dict[str, str]]:
    """The contenders by name, their errors, and why others cannot run. Arguments and errors as for :func:`measure`."""
    steps: dict[str, Step] = {}
    errors: dict[str, dict[str, float]] = {}
    reason = no_liger(base)
    refused = {LIGER: reason} if reason else {}
    dtype, PEFT = next(base.parameters()).dtype, peft_name(rank)
    few = {key: value[:texts] for key, value in batch.items()}
    expected: Results = {}
    for name, build in builders(base, rank, lora_rank).items():
        say(f"building and checking {name}")
        try:
            step = Step(build(), batch)
            own = name in (FROZEN, PEFT, peft_name(lora_rank, trained=True))
            wanted = exact_results(step.trained, few, wide) if own else expected
            expected = wanted if name == PEFT else expected
            found = results_of(step.trained, few)
            errors[name] = {part: difference(found[part], wanted[part].double()) for part in wanted}
            steps[name] = step
        except Exception as refusal:
            if name in (FROZEN, PEFT, OURS):
                raise
            refused[name] = f"{type(refusal).__name__}: {refusal}".splitlines()[0]
    tolerance = PEER_TOLERANCE if dtype.itemsize > 2 else _TWO_BYTE_TOLERANCE
    tokens = few["input_ids"].numel()
    for name, error in errors.items():
        for part, value in error.items():
            limit = allowed_error(errors[PEFT].get(part, 0.0), rank * tokens)
            if name != OURS:
                limit = max(limit, tolerance)
            elif part == "loss":  # of a single number, luck decides how near PEFT's is
                limit = max(limit, torch.finfo(dtype).eps)
            check(f"{name}, {part}", f"{tokens} tokens, r={rank}, {name_of(dtype)}", value, limit)
    return steps, errors, refused


def measure(
    base: nn.Module,
    batch: Batch,
    clock: Clock,
    rank: int,
    lora_rank: int,
    rounds: int,
    seconds: float = float("inf"),
    wide: torch.dtype = torch.float64,
    texts: int | None = None,
    checkpointing: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Steps of every contender in turn.

    Args:
        base: A Hugging Face model; its tensors are shared by all contenders and stay as they are.
        batch: With labels, on the model's device.
        clock: Of that device.
        rank: Of the updates with a frozen A.
        lora_rank: Of PEFT's LoRA whose A is trained.
        rounds: At most; ``seconds`` as for :func:`kore.bench.timing.in_turn`.
        wide: The dtype of the copies that the results are checked against.
        texts: Check on so many texts of the batch, which a ``wide`` copy of a large model has room for; None for all.
        checkpointing: Recompute each decoder layer in the backward pass.
        say: Hears what is being done.

    Raises:
        InaccurateError: A contender computes something else; nothing was timed.
    """
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    steps, errors, refused = checked(base, batch, rank, lora_rank, wide, texts, say)
    memory = {name: _memory(step, clock.device, checkpointing) for name, step in steps.items()}
    tokens = batch["input_ids"].numel()
    say("timing")
    times = in_turn(steps, lambda step: clock.laps(step.forward, step.backward, step.update), rounds, seconds=seconds)
    whole = {name: [sum(laps) for laps in every] for name, every in times.items()}
    return {
        "dtype": name_of(next(base.parameters()).dtype),
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "tokens": tokens,
        "rank": rank,
        "rounds": len(whole[OURS]),
        "checkpointing": checkpointing,
        "checked_against": name_of(wide),
        "contenders": {
            name: {
                **{part: summary([laps[i] for laps in every]) for i, part in enumerate(_PARTS)},
                "step": summary(whole[name]),
                "tokens_per_second": 1e3 * tokens / statistics.median(whole[name]),
                "over_frozen": ratio(whole[name], whole[FROZEN]),
                "ours_is_faster": ratio(whole[name], whole[OURS]),
                "trained_parameters": sum(parameter.numel() for parameter in steps[name].trained.parameters()),
                "relative_error": errors[name],
                **memory[name],
            }
            for name, every in times.items()
        },
        "refused": refused,
    }


def _memory(step: Step, device: torch.device, checkpointing: bool) -> dict[str, int | None]:
    """Kept for backward beside parameters; the most that a step holds, with the model and the optimizer's state.

    What checkpoints keep cannot be seen from here.
    """
    step()
    kept = None if checkpointing else saved_bytes(step.forward)
    step.clear()
    transient = peak_bytes(step, device)
    return {
        "saved_bytes": kept,
        "resident_bytes": step.resident_bytes(),
        "peak_bytes": None if transient is None else step.resident_bytes() + transient,
    }
