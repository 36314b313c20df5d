"""Greedy answers of a model to one batch of prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kore.data import Encoder
    from kore.evaluation.prompts import ProcessorPrompts


def positions(model: Any) -> int | None:
    """How many tokens the language model has positions for, as far as its configuration says."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    found = text.get("max_position_embeddings") if isinstance(text, dict) else None
    found = getattr(text, "max_position_embeddings", found)
    return found if isinstance(found, int) and found > 0 else None


def continuations(
    model: Any,
    encoder: Encoder | ProcessorPrompts,
    inputs: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    stops: Sequence[str] = (),
) -> list[str]:
    """What the model says after each prompt of a batch, as decoded, by plain greedy decoding.

    Args:
        model: In evaluation mode.
        encoder: Of the prompts.
        inputs: A batch of prompts, padded on the left.
        max_new_tokens: Longest answer.
        stops: Texts at which an answer ends; they are left in it.
    """
    import torch

    settings = _generation_config(model, encoder, max_new_tokens)
    extra: dict[str, Any] = {}
    if stops:
        settings.stop_strings = list(stops)
        extra["tokenizer"] = encoder.tokenizer
    device, unused = next(model.parameters()).device, _unused(model)
    placed = {name: _placed(value, model, device) for name, value in inputs.items() if name not in unused}
    with torch.no_grad():
        tokens = model.generate(**placed, generation_config=settings, **extra)
    length = placed["input_ids"].shape[1]
    return [encoder.decode(row[length:]) for row in tokens]


def _unused(model: Any) -> set[str]:
    """What tokenizers and encoders may give that ``generate`` refuses."""
    from kore.models import base_model

    taken = inspect.signature(base_model(model).forward).parameters
    return {"labels"} | ({"token_type_ids"} - set(taken))


def _placed(value: torch.Tensor, model: Any, device: torch.device) -> torch.Tensor:
    """On the model's device, pixels in its dtype."""
    dtype = getattr(model, "dtype", None) if value.is_floating_point() else None
    return value.to(device, dtype or value.dtype)


def _generation_config(model: Any, encoder: Encoder | ProcessorPrompts, max_new_tokens: int) -> Any:
    """Plain greedy decoding; a checkpoint's own sampling and repetition settings are left out."""
    from transformers import GenerationConfig

    ends: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), encoder.tokenizer.eos_token_id):
        ends.update([value] if isinstance(value, int) else value or [])
    pad = encoder.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
    )
