"""What KORE needs to know of a Hugging Face model: how to load it and which module is which."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_VISION = ("vision_tower", "visual", "vision_model", "vision_encoder")
_PROJECTORS = ("multi_modal_projector", "visual.merger", "mm_projector")
_FINGERPRINT_SAMPLES = 32


def load_model(
    path: str | os.PathLike[str], dtype: str = "auto", device: str = "auto", **kwargs: Any
) -> PreTrainedModel:
    """Load a LLaVA-1.5, Qwen2.5-VL or text-only model.

    Args:
        path: A directory written by ``save_pretrained``, or a Hugging Face hub id.
        dtype: ``"auto"`` (the checkpoint's own), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"`` (the first CUDA device, else the CPU) or a torch device name.
        kwargs: Passed on to ``from_pretrained``; with ``device_map`` the model stays where that puts it.

    Raises:
        ModelError: The model cannot be found or read, or the checkpoint lacks some of its weights.
    """
    import torch
    import transformers
    from packaging.version import Version

    text = os.fspath(path)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise ModelError(f"{text}: not a model directory, it has no config.json")
    elif Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"{text}: no such model directory (a hub id has the form owner/name)")
    dtype_argument = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(text)
        auto_class: Any = (
            transformers.AutoModelForImageTextToText
            if getattr(config, "vision_config", None) is not None
            else transformers.AutoModelForCausalLM
        )
        kwargs.update({dtype_argument: torch_dtype, "output_loading_info": True})
        model, loading = auto_class.from_pretrained(text, **kwargs)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{text}: the model cannot be loaded ({type(error).__name__}: {first_line})") from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{text}: {len(missing)} weights of the model are not in the checkpoint, for example {missing[0]}; "
            f"transformers {transformers.__version__} would make them up. Load it with the version that wrote it"
        )
    if "device_map" not in kwargs:
        model.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return model.eval()


def load_image_processor(path: str | os.PathLike[str], pillow: bool = False, **kwargs: Any) -> Any:
    """A checkpoint's image processor; the one that works with Pillow if asked, and where torchvision is missing."""
    import transformers
    from packaging.version import Version
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # some versions hide it elsewhere
    from transformers.utils import is_torchvision_available

    if pillow or not is_torchvision_available():
        kwargs |= {"backend": "pil"} if Version(transformers.__version__) >= Version("5") else {"use_fast": False}
    return AutoImageProcessor.from_pretrained(path, **kwargs)


def base_model(model: Any) -> Any:
    """The Hugging Face model inside DistributedDataParallel and PEFT wrappers (adapter layers stay in place)."""
    from peft import PeftModel

    while not isinstance(model, PeftModel) and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_vision(model: Any) -> bool:
    """Whether the model has a vision tower."""
    return any(name.rpartition(".")[2] in _VISION for name, _ in base_model(model).named_modules())


def projector_name(model: nn.Module) -> str | None:
    """Module name of the multimodal projector, or None for a text-only model."""
    names = [name for name, _ in base_model(model).named_modules()]
    for projector in _PROJECTORS:
        for name in names:
            if name == projector or name.endswith(f".{projector}"):
                return name
    return None


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")


def _named_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers under the names of the model without adapters; of an adapted layer, its base layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = None
    for name, module in base_model(model).named_modules():
        if adapted is not None and name.startswith(adapted):
            continue
        adapted = None
        if ".modules_to_save." in f".{name}.":
            continue
        clean = ".".join(part for part in name.split(".") if part != "original_module")
        if isinstance(module, BaseTunerLayer):
            adapted = f"{name}."
            if _is_linear(module.get_base_layer()):
                yield clean, module.get_base_layer()
        elif _is_linear(module):
            yield clean, module


def named_linears(model: nn.Module) -> dict[str, Any]:
    """Every linear layer by module name (``nn.Linear``, ``Conv1D``, quantised linears), the output head included."""
    return dict(_named_linears(model))


def linear_shape(linear: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, also of ``Conv1D``, which stores its weight transposed.

    Of a parameter that DeepSpeed ZeRO-3 has partitioned, the shape of the whole.
    """
    if hasattr(linear, "in_features"):
        return int(linear.out_features), int(linear.in_features)
    d_in, d_out = getattr(linear.weight, "ds_shape", linear.weight.shape)
    return int(d_out), int(d_in)


def language_model_linears(model: nn.Module) -> list[str]:
    """Names of every linear layer of the language model except the output head, in model order.

    For a model without a vision tower this is every linear layer except the output head.
    """
    base = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linears = {name: linear for name, linear in _named_linears(base) if linear is not head}
    if not has_vision(base):
        return list(linears)
    language_model = _language_model_name(base)
    return [name for name in linears if name.startswith(f"{language_model}.")]


def _language_model_name(base: Any) -> str:
    modules = dict(base.named_modules())
    for name in modules:
        if name.rpartition(".")[2] == "language_model":
            return name
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    for name, module in modules.items():
        if name and module is decoder and not has_vision(module):
            return name
    raise ModelError(f"{type(base).__name__}: no language model found; name the target modules yourself")


def resolve_targets(model: nn.Module, targets: str | Sequence[str] | None = None) -> list[str]:
    """Module names of the linear layers that ``targets`` selects, in model order.

    Args:
        model: The model, with or without adapters.
        targets: None for :func:`language_model_linears`; a regular expression that must match a whole module
            name; or a list of PEFT-style names, each a module name or the end of one (``"q_proj"``). As in PEFT,
            a bare ``"q_proj"`` selects the vision tower's projections too.

    Raises:
        ModelError: A name or expression selects no linear layer; close matches are listed.
    """
    if targets is None:
        return language_model_linears(model)
    names = list(named_linears(model))
    if isinstance(targets, str):
        try:
            selected = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise ModelError(f"targets: {targets!r} is not a regular expression ({error})") from None
        if not selected:
            raise ModelError(f"targets: {targets!r} matches no linear layer of {type(base_model(model)).__name__}")
        return selected
    selected_set: set[str] = set()
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.4) or known[:8]
            raise ModelError(f"targets: no linear layer is named {target!r}; near: {', '.join(near)}")
        selected_set.update(found)
    return [name for name in names if name in selected_set]


def model_fingerprint(model: nn.Module) -> dict[str, str | None]:
    """Identify the base model an artifact belongs to.

    Adapters are left out, so a model gives the same fingerprint with and without them.

    Returns:
        ``architecture``, the class name; ``structure``, a hash of the linear layers' names and shapes;
        ``weights``, a hash of samples of their weights rounded to bfloat16 (the same for a model loaded in
        float32 and in bfloat16), or None where weights are quantised, sharded or on the meta device.
    """
    import torch

    linears = named_linears(model)
    structure, weights, readable = hashlib.sha256(), hashlib.sha256(), True
    for name, linear in linears.items():
        structure.update(f"{name}{linear_shape(linear)}\n".encode())
        weight = linear.weight  # of a quantised layer it can be packed, of another tensor class, or a method
        plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
        if not plain or not weight.is_floating_point() or weight.is_meta or weight.numel() == 0:
            readable = False
            continue
        index = torch.linspace(0, weight.numel() - 1, _FINGERPRINT_SAMPLES, dtype=torch.float64).long()
        index = torch.stack([index // weight.shape[-1], index % weight.shape[-1]]).to(weight.device)
        sample = weight.detach().reshape(-1, weight.shape[-1])[index[0], index[1]]
        weights.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return {
        "architecture": _architecture(model),
        "structure": structure.hexdigest(),
        "weights": weights.hexdigest() if readable else None,
    }


def _architecture(model: nn.Module) -> str:
    """The class name; of a model that FSDP2 has given a class (its mixin, the model's class), the latter's."""
    classes = type(base_model(model)).__mro__
    mixin = next((index for index, each in enumerate(classes) if each.__name__ == "FSDPModule"), -1)
    return classes[mixin + 1].__name__


def check_fingerprint(expected: dict[str, str | None], model: nn.Module, what: str) -> None:
    """Raise ModelError unless ``model`` is the base model that ``expected`` was taken from.

    Args:
        expected: A result of :func:`model_fingerprint`, as stored with an artifact.
        model: The model now at hand.
        what: The artifact, for the message, for example ``"covariance runs/a/covariance"``.
    """
    found = model_fingerprint(model)
    for field, reason in (
        ("architecture", "another architecture"),
        ("structure", "other layer names or shapes"),
        ("weights", "other weights"),
    ):
        if expected.get(field) and found[field] and expected[field] != found[field]:
            values = f" ({expected[field]}, this model is {found[field]})" if field == "architecture" else ""
            raise ModelError(f"{what} belongs to another model: {reason}{values}; make it again for this model")
