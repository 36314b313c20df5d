"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kore.errors import ConfigError

Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


class TrainConfig(BaseModel):
    """How to train. The defaults are the paper's: B at 2e-4, the projector at 2e-5, AdamW, cosine with 3 %
    warm-up, no weight decay, 6 epochs."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    learning_rate: float = Field(2e-4, gt=0, description="learning rate of everything but the projector")
    projector_learning_rate: float | None = Field(
        2e-5, gt=0, description="learning rate of the multimodal projector; null: the same as learning_rate"
    )
    epochs: float = Field(6.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="stop after so many optimizer steps, whatever epochs says")
    batch_size: int = Field(8, gt=0, description="conversations per process and forward pass")
    gradient_accumulation: int = Field(1, gt=0, description="forward passes per optimizer step")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    scheduler: Scheduler = "cosine"
    optimizer: str = Field("adamw_torch", description="any optim name of Hugging Face TrainingArguments")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 turns it off")
    max_length: int | None = Field(2048, gt=0, description="longest example in tokens; longer ones are cut")
    bf16: bool | Literal["auto"] = Field("auto", description="bfloat16 autocast; auto: on GPUs that have it")
    master_weights: bool = Field(True, description="under bf16, keep the trained weights in float32")
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0)
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="what to do with examples that cannot be encoded")
    dataloader_workers: int | Literal["auto"] = Field("auto", description="auto: 4 with a GPU, else 0")
    logging_steps: int = Field(10, gt=0)
    save_steps: int | None = Field(200, gt=0, description="steps between checkpoints; null: none")
    save_total_limit: int = Field(2, gt=0, description="how many checkpoints are kept")
    report_to: list[str] = Field(default=["tensorboard"], description="any loggers Hugging Face Trainer knows")
    progress: bool = True
    deepspeed: str | dict[str, Any] | None = Field(None, description="DeepSpeed configuration file or contents")
    fsdp: str | list[str] | None = None
    fsdp_config: str | dict[str, Any] | None = None
    trainer_arguments: dict[str, Any] = Field(
        default={}, description="further fields of Hugging Face TrainingArguments, as they are"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_logger(cls, value: Any) -> Any:
        if value is None or value == "none":
            return []
        return [value] if isinstance(value, str) else value

    @classmethod
    def of(cls, config: TrainConfig | Mapping[str, Any] | None) -> TrainConfig:
        """The configuration itself, or one made of its fields; None gives the defaults.

        Raises:
            ConfigError: A field is unknown or its value is wrong; the message names the first such field.
        """
        if isinstance(config, TrainConfig):
            return config
        try:
            return cls(**(config or {}))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"][:1])
            if first["type"] == "extra_forbidden":
                raise ConfigError(
                    f"train.{name}: no such setting; expected one of {', '.join(cls.model_fields)}"
                ) from None
            raise ConfigError(f"train.{name}: {first['msg'].lower()}, got {first['input']!r}") from None

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result; the others only decide what is shown, kept, or where it runs."""
        return self.model_dump(exclude=_NO_EFFECT, mode="json")


_NO_EFFECT = {"logging_steps", "save_steps", "save_total_limit", "report_to", "progress", "dataloader_workers"}
