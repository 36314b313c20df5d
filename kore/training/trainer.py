"""The Hugging Face Trainer, with KORE's parameter groups, loss and checkpoints."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from kore.errors import KoreError
from kore.models import base_model, projector_name
from kore.protection import TwoSided
from kore.training.checkpoints import keep_newest, mark_complete
from kore.training.config import TrainConfig
from kore.training.weights import load_trained, save_trained

_IGNORE = -100


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
    """Cross entropy summed over the labelled tokens and divided by ``count``.

    Args:
        logits: (batch, positions, vocabulary), any float dtype; computed in float32, on labelled tokens only.
        targets: (batch, positions), the token after each position; -100 carries no loss.
        count: Labelled tokens of the whole optimizer step, over all its forward passes and processes; None
            means those of ``targets``.
    """
    targets = targets.to(logits.device)
    labelled = targets != _IGNORE
    total = torch.nn.functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="sum")
    return total / (labelled.sum() if count is None else count)


def batch_loss(
    model: Any, inputs: dict[str, Any], count: torch.Tensor | int | None, selects_logits: bool
) -> tuple[torch.Tensor, Any]:
    """:func:`answer_loss` of one batch with ``labels``, and the model's outputs.

    With ``selects_logits`` the output head, the largest activation of all, runs only where some row of the batch has an
    answer; the model must know ``logits_to_keep``.
    """
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]
    if selects_logits:
        places = (targets != _IGNORE).any(dim=0).nonzero().squeeze(1)
        outputs = model(**inputs, use_cache=False, logits_to_keep=places)
        return answer_loss(outputs.logits, targets[:, places], count), outputs
    outputs = model(**inputs, use_cache=False)
    return answer_loss(outputs.logits[:, :-1], targets, count), outputs


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


class KoreTrainer(Trainer):
    """Trains what requires a gradient, the multimodal projector at its own learning rate.

    Checkpoints hold the adapter only (of a model without adapter: the trained weights), count once they are
    complete, and load into the parameters in place, so what is frozen stays frozen. ``protection`` is added to the
    loss of every optimizer step once, whatever way the step is split.
    """

    def __init__(self, model: Any, *, config: TrainConfig, protection: TwoSided | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(LogLastStep)
        if config.progress:
            self.add_callback(LossBar)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, in compute_loss
        self._config = config
        self._protection = protection
        self._penalty: torch.Tensor | None = None
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
        loss, outputs = batch_loss(model, inputs, num_items_in_batch, self._selects_logits)
        if "pixel_values" not in inputs and not self.is_fsdp_enabled:
            # A batch without images gives the projector a zero gradient, as DDP needs one for every parameter.
            loss = torch.stack([loss, *(parameter.sum() * 0 for parameter in self._projector_parameters)]).sum()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self._protection is not None and model.training and self.accelerator.sync_gradients:
            penalty = self._protection()
            self._penalty = penalty.detach()
            if num_items_in_batch is None:  # the Trainer then divides the loss by the forward passes of the step
                penalty = penalty * getattr(
                    self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
                )
            loss = loss + penalty.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the projector's learning rate; stops the run when the loss is not finite."""
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise KoreError(
                f"the training loss is {loss} at step {self.state.global_step}; lower train.learning_rate "
                "(or train.projector_learning_rate), or look for broken examples"
            )
        if self._protection is not None and self._penalty is not None and loss is not None:
            logs["penalty"] = float(self._penalty)
            logs["old_divergence"] = float(self._protection.divergence)  # type: ignore[arg-type]
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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            directory = Path(str(self.args.output_dir))
            mark_complete(directory / f"checkpoint-{self.state.global_step}", self.state.global_step)
            keep_newest(directory, self._config.save_total_limit)
