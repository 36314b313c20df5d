"""The Hugging Face Trainer, with KORE's parameter groups, loss and checkpoints."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from kore.artifacts import load_tensors, save_tensors
from kore.errors import KoreError
from kore.models import base_model, projector_name
from kore.penalty import IGNORE, Forward, Penalty
from kore.training.checkpoints import keep_newest, mark_complete
from kore.training.config import TrainConfig
from kore.training.weights import load_trained, save_trained

STATE = "penalty.safetensors"
"""The file of a checkpoint for the state of a penalty."""


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Cross entropy summed over the labelled tokens and divided by ``count``.

    Args:
        logits: (batch, positions, vocabulary), any float dtype; computed in float32, on labelled tokens only.
        targets: (batch, positions), the token after each position; -100 carries no loss.
        count: Labelled tokens of the whole optimizer step, over all its forward passes and processes.
    """
    labelled = targets != IGNORE
    return torch.nn.functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="sum") / count


def forward(model: Any, batch: dict[str, Any], selects_logits: bool, count: Any = None) -> Forward:
    """Run one batch with ``labels`` through the model.

    With ``selects_logits`` the output head, the largest activation of all, runs only where some row of the batch has an
    answer; the model must know ``logits_to_keep``. ``count`` is by default the batch's own number of labelled tokens.
    """
    inputs = {**batch, "use_cache": False}
    targets = inputs.pop("labels")[:, 1:]
    if selects_logits:
        places = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
        inputs["logits_to_keep"], targets = places, targets[:, places]
    outputs = model(**inputs)
    logits = outputs.logits if selects_logits else outputs.logits[:, :-1]
    count = (targets != IGNORE).sum() if count is None else count
    return Forward(inputs, outputs, logits, targets.to(logits.device), count)


def selects_logits(model: Any) -> bool:
    """Whether the model can compute some positions' logits only."""
    return "logits_to_keep" in inspect.signature(base_model(model).forward).parameters


class LossBar(ProgressCallback):
    """A progress bar that shows the loss at its end instead of printing every log entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


class LogLastStep(TrainerCallback):
    """Makes the history end with the last step, whatever ``logging_steps`` is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class Updates(TrainerCallback):
    """Tells a penalty of each update of the weights."""

    def __init__(self, penalty: Penalty) -> None:
        self._penalty = penalty

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._penalty.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._penalty.after_update()


class KoreTrainer(Trainer):
    """Trains what requires a gradient, the multimodal projector at its own learning rate.

    Checkpoints hold the adapter only (of a model without adapter: the trained weights), count once they are
    complete, and load into the parameters in place, so what is frozen stays frozen. What ``penalty`` gives is added
    to the loss of every optimizer step, whatever way the step is split.
    """

    def __init__(self, model: Any, *, config: TrainConfig, penalty: Penalty | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(LogLastStep)
        if penalty is not None:
            self.add_callback(Updates(penalty))
        if config.progress:
            self.add_callback(LossBar)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, in compute_loss
        self._config = config
        self._penalty = penalty
        self._paid: torch.Tensor | None = None
        self._step_ended = True
        self._model: torch.nn.Module = model
        base = base_model(model)
        self._selects_logits = selects_logits(model)
        self._projector = projector_name(base)
        self._projector_ratio: float | None = None
        self._projector_parameters = [p for name, p in model.named_parameters() if self._in_projector(name, p)]

    def _in_projector(self, name: str, parameter: torch.nn.Parameter) -> bool:
        if not parameter.requires_grad or self._projector is None:
            return False
        return f".{self._projector}." in f".{name.replace('_fsdp_wrapped_module.', '')}"

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (or the configured optimizer) over two groups: everything else, then the projector."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            rest: list[torch.nn.Parameter] = []
            projector: list[torch.nn.Parameter] = []
            for name, parameter in target.named_parameters():
                if parameter.requires_grad:
                    (projector if self._in_projector(name, parameter) else rest).append(parameter)
            optimizer_class, values = Trainer.get_optimizer_cls_and_kwargs(self.args, target)
            decay = {"weight_decay": self.args.weight_decay}
            rate = self._config.learning_rate
            projector_rate = self._config.projector_learning_rate or rate
            groups = [
                {"params": rest, "lr": rate, **decay},
                {"params": projector, "lr": projector_rate, **decay},
            ]
            if projector:
                self._projector_ratio = projector_rate / rate if rest else 1.0
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **values)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule, warmed up over ``warmup_ratio`` of the steps, rounded up."""
        self.args.warmup_steps = math.ceil(self._config.warmup_ratio * num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy over the answer tokens of the whole optimizer step, whatever way it is split."""
        passed = forward(model, inputs, self._selects_logits, num_items_in_batch)
        loss = answer_loss(passed.logits, passed.targets, passed.count)
        if "pixel_values" not in inputs and not self.is_fsdp_enabled:
            # A batch without images gives the projector a zero gradient, as DDP needs one for every parameter.
            loss = torch.stack([loss, *(parameter.sum() * 0 for parameter in self._projector_parameters)]).sum()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self._penalty is not None and model.training:
            loss = loss + self._added(self._penalty, passed, num_items_in_batch is not None)
        return (loss, passed.outputs) if return_outputs else loss

    def _added(self, penalty: Penalty, passed: Forward, split: bool) -> torch.Tensor:
        """What the penalty adds to the loss of one forward pass.

        ``split``: the loss is a sum over the step, divided by its tokens, of which the Trainer takes the mean over the
        processes; else a mean over this pass, which the Trainer divides by the number of passes.
        """
        added = torch.zeros((), device=passed.logits.device)
        paid = torch.zeros_like(added) if self._paid is None or self._step_ended else self._paid
        self._step_ended = self.accelerator.sync_gradients
        by_pass = penalty.batch(passed)
        if by_pass is not None:
            added = added + by_pass * (self.accelerator.num_processes if split else 1)
            paid = paid + by_pass.detach()
        by_step = penalty.step() if self._step_ended else None
        if by_step is not None:
            by_step = by_step.to(added.device)
            added = added + by_step * (1 if split else self._passes)
            paid = paid + by_step.detach()
        self._paid = paid
        return added

    @property
    def _passes(self) -> int:
        passes = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return int(passes)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the projector's learning rate; stops the run when the loss is not finite."""
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise KoreError(
                f"the training loss is {loss} at step {self.state.global_step}; lower train.learning_rate "
                "(or train.projector_learning_rate), or look for broken examples"
            )
        if self._penalty is not None and self._paid is not None and loss is not None:
            logs |= {"penalty": float(self._paid), **self._penalty.log()}
        if "learning_rate" in logs and self._projector_ratio is not None:
            logs["projector_learning_rate"] = logs["learning_rate"] * self._projector_ratio
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._sharded:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_trained(self._model, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        if self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(model, Path(resume_from_checkpoint))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        state = Path(resume_from_checkpoint) / STATE
        if self._penalty is not None and state.is_file():
            self._penalty.load_state(load_tensors(state))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            directory = Path(str(self.args.output_dir))
            checkpoint = directory / f"checkpoint-{self.state.global_step}"
            state = {} if self._penalty is None else self._penalty.state()
            if state:
                save_tensors(state, checkpoint / STATE)
            mark_complete(checkpoint, self.state.global_step)
            keep_newest(directory, self._config.save_total_limit)
