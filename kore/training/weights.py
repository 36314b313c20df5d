"""The trained weights of a model: the adapter of a PEFT model, else every parameter that requires a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import load_tensors, save_tensors
from kore.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = "adapter_model.safetensors"
TRAINED = "trained.safetensors"


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is a PEFT model."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def save_trained(model: nn.Module, directory: Path) -> None:
    """Write the trained weights of ``model`` into ``directory``: a stock PEFT adapter where it has one."""
    from kore.adapter.files import mark_type

    directory.mkdir(parents=True, exist_ok=True)
    if has_adapter(model):
        model.save_pretrained(directory, save_embedding_layers=False)  # type: ignore[operator]
        mark_type(directory, getattr(model, "kore_info", None))
    else:
        save_tensors(_trained(model), directory / TRAINED)


def load_trained(model: nn.Module, directory: Path) -> None:
    """Read what :func:`save_trained` wrote into the parameters of ``model``, in place; nothing is thawed.

    Raises:
        ArtifactError: The file is missing, broken, or has other tensors than the model.
    """
    if has_adapter(model):
        from peft import set_peft_model_state_dict

        tensors = load_tensors(directory / ADAPTER)
        outcome: Any = set_peft_model_state_dict(model, tensors)
        unexpected = list(outcome.unexpected_keys)
        if unexpected:
            raise ArtifactError(f"{directory / ADAPTER}: the model has no {unexpected[0]}")
        return
    tensors, parameters = load_tensors(directory / TRAINED), _trained(model)
    if tensors.keys() != parameters.keys():
        name = sorted(tensors.keys() ^ parameters.keys())[0]
        raise ArtifactError(f"{directory / TRAINED}: {name} is only in one of the file and the model")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
