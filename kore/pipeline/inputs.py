"""What the stages depend on, by name, for their keys."""

from __future__ import annotations

from typing import Any

from kore.artifacts import file_sha256
from kore.pipeline.config import DataSection, ModelSection
from kore.pipeline.stage import model_identity


def model_inputs(model: ModelSection) -> dict[str, Any]:
    return {"model": model_identity(model.path), "model.dtype": model.dtype}


def data_inputs(prefix: str, section: DataSection) -> dict[str, Any]:
    settings = section.model_dump(mode="json", exclude={"files"})
    return {f"{prefix}.files": [file_sha256(file) for file in section.files], **flat(prefix, settings)}


def flat(prefix: str, settings: Any) -> dict[str, Any]:
    values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
    return {f"{prefix}.{name}": value for name, value in values.items()}
