"""One training run, from a prepared model and conversations to an adapter (or a model) on disk."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_directory, atomic_write, read_json
from kore.data.encoder import Encoder
from kore.data.types import BadRow, Conversation
from kore.errors import ConfigError, DataError, KoreError, ModelError
from kore.penalty import PENALTY, Start
from kore.recipes import mark
from kore.training.checkpoints import keep_newest, newest_complete, remove_incomplete
from kore.training.config import TrainConfig
from kore.training.dataset import TrainingSet
from kore.training.identity import check_identity, run_identity, write_identity
from kore.training.penalized import check_sharding, untouched_loss
from kore.training.weights import has_adapter, load_trained

if TYPE_CHECKING:
    from kore.penalty import Penalty
    from kore.training.trainer import KoreTrainer

logger = logging.getLogger(__name__)

HISTORY = "history.json"


@dataclass
class TrainResult:
    """What a training run gave.

    Attributes:
        history: Log entries in order: step, epoch, loss, learning_rate, grad_norm, ...
        model: The trained model, in evaluation mode.
        output_dir: Where everything lies.
        adapter_dir: The stock PEFT adapter, or None for a model trained without adapter.
        model_dir: The whole model, or None for an adapter.
        bad_rows: Examples that were left out.
    """

    history: list[dict[str, Any]]
    model: Any
    output_dir: Path
    adapter_dir: Path | None = None
    model_dir: Path | None = None
    bad_rows: tuple[BadRow, ...] = field(default=())

    @property
    def target(self) -> Path:
        """The adapter, or the model trained without one."""
        target = self.adapter_dir or self.model_dir
        assert target is not None
        return target


def train(
    model: Any,
    encoder: Encoder,
    conversations: Sequence[Conversation],
    config: TrainConfig | Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike[str] = "train",
    *,
    resume: bool = True,
    penalty: Penalty | None = None,
    recipe: str | None = None,
) -> TrainResult:
    """Train what requires a gradient in ``model``, with loss on the answers of ``conversations``.

    Writes ``adapter/`` (of a model without adapter: ``model/``), ``history.json``, ``loss.png``, ``run.json`` and
    checkpoints into ``output_dir``. Under ``torchrun`` it runs data-parallel; call it in every process.

    Args:
        model: A PEFT model (``get_kore_model``, ``baselines.prepare_model``) or any Hugging Face model with
            trainable parameters. Its weights are changed in place.
        encoder: The model's encoder; ``config.max_length`` replaces its own.
        conversations: Each with at least one answer; images and text-only ones may be mixed.
        config: A :class:`TrainConfig`, its fields as a mapping, or None for the defaults.
        output_dir: A directory of its own for this run.
        resume: Continue from the newest complete checkpoint in ``output_dir``, or return the finished run there;
            the result is that of an uninterrupted run. False starts over.
        penalty: What is added to the loss of every step, such as :func:`kore.two_sided` or what a baseline's
            ``penalty`` gives. The history's ``loss`` is the sum, its ``penalty`` the penalty alone at the last step of
            the entry (its share by tokens as this process sees it). Not with FSDP1 or DeepSpeed ZeRO-3.
        recipe: The recipe that the settings come from, for ``kore.json`` of an adapter that has none yet; see
            :mod:`kore.recipes`. An adapter that has one keeps it. Where training differs from it is listed there.

    Raises:
        ModelError: Nothing in the model is trainable.
        ConfigError: A setting is wrong or asks what the machine cannot do, or ``output_dir`` holds another run.
        DataError: An example cannot be encoded.
        KoreError: The loss is not finite, or memory does not suffice.
    """
    config = TrainConfig.of(config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("nothing in the model is trainable; wrap it with get_kore_model or baselines.prepare_model")
    if penalty is not None:
        check_sharding(config, penalty.reads_gradients)
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{output_dir}: expected a directory for the training run, found a file")
    encoder = copy.copy(encoder)
    encoder.max_length = config.max_length
    examples = TrainingSet(conversations, encoder, config.on_bad_row)

    from kore.adapter.halves import check_weight_decay
    from kore.protection import TwoSided
    from kore.training.arguments import training_arguments

    arguments = training_arguments(config, output_dir, model)
    check_weight_decay(model, arguments.weight_decay)
    identity = run_identity(model, encoder, examples.conversations, config, arguments.world_size)
    if penalty is not None:
        identity["penalty"] = penalty.identity()
    known = resume and check_identity(output_dir, identity)
    result = _result(model, output_dir, examples.bad_rows)
    if known and (output_dir / HISTORY).is_file() and result.target.is_dir():
        logger.info("%s: already trained", output_dir)
        return _reload(result)
    checkpoint = newest_complete(output_dir) if known else None
    _barrier()
    if arguments.process_index == 0:
        _prepare(output_dir, identity, keep=known)
    _barrier()
    if penalty is not None:
        untouched = partial(untouched_loss, model, encoder, examples, config.batch_size)
        penalty.begin(
            Start(
                model,
                encoder,
                examples,
                config.batch_size,
                output_dir / PENALTY,
                untouched,
                config.seed,
                config.on_bad_row,
                config,
            )
        )
    mark(model, recipe, train=config, protection=penalty if isinstance(penalty, TwoSided) else None)
    result.history = _fit(model, encoder, examples, config, arguments, result, checkpoint, penalty)
    return result


def _result(model: Any, output_dir: Path, bad_rows: tuple[BadRow, ...]) -> TrainResult:
    adapter = has_adapter(model)
    return TrainResult(
        [],
        model,
        output_dir,
        adapter_dir=output_dir / "adapter" if adapter else None,
        model_dir=None if adapter else output_dir / "model",
        bad_rows=bad_rows,
    )


def _prepare(output_dir: Path, identity: dict[str, Any], keep: bool) -> None:
    """Make ``output_dir`` ready, with what an interrupted run left whole or, unless ``keep``, without it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_incomplete(output_dir)
    if keep:
        return
    (output_dir / HISTORY).unlink(missing_ok=True)
    keep_newest(output_dir, 0)
    for name in ("adapter", "model", PENALTY):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    write_identity(output_dir, identity)


def _fit(
    model: Any,
    encoder: Encoder,
    examples: TrainingSet,
    config: TrainConfig,
    arguments: Any,
    result: TrainResult,
    checkpoint: Path | None,
    penalty: Penalty | None,
) -> list[dict[str, Any]]:
    import torch

    from kore.training.trainer import KoreTrainer

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    if arguments.bf16 and config.master_weights:
        _cast_trained(model, dict.fromkeys(dtypes, torch.float32))
    try:
        trainer = KoreTrainer(
            model=model,
            config=config,
            penalty=penalty,
            args=arguments,
            train_dataset=examples,
            data_collator=encoder.collate,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"training cannot start with this configuration: {error}") from error
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    if checkpoint is not None:
        logger.info("continuing from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.cuda.OutOfMemoryError as error:
        raise KoreError(
            f"the GPU has not enough memory for batch_size {config.batch_size} and max_length {config.max_length}; "
            "lower batch_size and raise gradient_accumulation, or turn on gradient_checkpointing"
        ) from error
    except DataError as error:
        # A data loader worker wraps the message in its traceback; the last line is the message itself.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("kore.errors.DataError: ")) from error
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if penalty is not None:
        penalty.finish()
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if result.model_dir is not None:
        _cast_trained(model, dtypes)
    _save(trainer, encoder, result, history)
    _cast_trained(model, dtypes)
    del trainer
    gc.collect()
    model.eval()
    return history


def _checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; without re-entrance, so frozen inputs need no gradient."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _cast_trained(model: Any, dtypes: Mapping[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def _save(trainer: KoreTrainer, encoder: Encoder, result: TrainResult, history: list[dict[str, Any]]) -> None:
    """Write the result; ``history.json`` comes last and means that the run is finished."""
    target = result.target
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded:
        gathered = result.output_dir / "gathered"
        trainer.save_model(str(gathered))
    if trainer.args.should_save:
        if sharded:
            if result.adapter_dir is not None:
                from kore.adapter.files import describe_adapter

                describe_adapter(result.model, gathered)
            shutil.rmtree(target, ignore_errors=True)
            gathered.rename(target)
        elif result.adapter_dir is not None:
            from kore.adapter import save_adapter

            save_adapter(result.model, target)
        else:
            with atomic_directory(target) as directory:
                encoder.save_pretrained(directory)
                result.model.save_pretrained(directory)
        _plot(history, result.output_dir / "loss.png")
        atomic_write(result.output_dir / HISTORY, json.dumps(history, indent=1) + "\n")
    _barrier()


def _plot(history: list[dict[str, Any]], path: Path) -> None:
    import io

    from kore.report.figures import loss_curves

    buffer = io.BytesIO()
    loss_curves({"training": history}).savefig(buffer, format="png", dpi=150)
    atomic_write(path, buffer.getvalue())


def _reload(result: TrainResult) -> TrainResult:
    """Put the weights of a finished run into the model."""
    if result.adapter_dir is not None:
        load_trained(result.model, result.adapter_dir)
    elif result.model_dir is not None:
        from kore.models import load_model

        result.model.load_state_dict(load_model(result.model_dir, device="cpu").state_dict())
    result.history = read_json(result.output_dir / HISTORY)
    result.model.eval()
    return result


def _barrier() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()
