"""One name for a weight, whichever library or version wrote the checkpoint.

The same tensor is ``model.layers.0.mlp.up_proj.weight`` in the original LLaVA repository and on disk for Qwen2.5-VL,
``language_model.model.layers...`` or ``model.language_model.layers...`` in the Hugging Face classes, depending on their
version. Its role is what these names have in common: ``layers.0.mlp.up_proj.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable

from kore.errors import ArtifactError

VISION, PROJECTOR = "vision.", "projector."
A_NAME, B_NAME, BIAS_NAME, RESIDUAL_NAME = "BLinear.weight", "ALinear.weight", "ALinear.bias", "weight_residual"
_VISION = {"vision_tower", "vision_model", "vision_encoder", "visual"}
_PROJECTORS = {"mm_projector", "multi_modal_projector"}
_LLAVA_PROJECTOR = {"0": "linear_1", "2": "linear_2"}
_WRAPPERS = {"model", "language_model"}


def role_of(name: str) -> str:
    """The role of a tensor or module name."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part in _PROJECTORS:
            rest = parts[index + 1 :]
            return PROJECTOR + ".".join(_LLAVA_PROJECTOR.get(word, word) for word in rest)
    inside = [index for index, part in enumerate(parts) if part in _VISION]
    if inside:
        return _merger(".".join(parts[inside[-1] + 1 :]))
    if "layers" in parts:
        return ".".join(parts[parts.index("layers") :])
    while parts[0] in _WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def _merger(name: str) -> str:
    """Qwen2.5-VL keeps its projector, the merger, inside the vision tower."""
    return PROJECTOR + name.removeprefix("merger.") if name.startswith("merger.") else VISION + name


def by_role(names: Iterable[str], where: str) -> dict[str, str]:
    """The names by role. Raises ArtifactError when two have the same."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(role_of(name), name)
        if other != name:
            raise ArtifactError(f"{where}: {other} and {name} are both {role_of(name)}; expected one of them")
    return found


def is_language_linear(role: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer of the language model other than its output head."""
    return role.startswith("layers.") and role.endswith(".weight") and len(shape) == 2
