"""Training on Hugging Face Trainer: two learning rates, exact resume, data parallel."""

from __future__ import annotations

from kore.training.config import TrainConfig
from kore.training.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
