"""From an official checkpoint to a PEFT adapter on the untouched base model."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kore.adapter.files import save_adapter
from kore.adapter.wrap import wrap_lora
from kore.errors import ArtifactError, ConfigError
from kore.models import model_fingerprint, projector_name
from kore.official.base import lazy_model
from kore.official.checkpoint import Checkpoint
from kore.official.factors import initial_factor, lowest_rank
from kore.official.names import A_NAME, B_NAME, BIAS_NAME, PROJECTOR, RESIDUAL_NAME, VISION, by_role, role_of
from kore.sizes import format_bytes

ROWS_MAY_DIFFER = ("embed_tokens.weight", "lm_head.weight")  # the Hugging Face LLaVA pads its vocabulary
_ROWS = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """What became of a checkpoint.

    Attributes:
        output: The directory written.
        rank: r of the result.
        remainders: For every layer, what of W0 − W_res is not explained by A, as a multiple of what rounding can
            leave (see :class:`kore.official.factors.Recovered`).
        projector: Whether a trained projector is part of it.
    """

    output: Path
    rank: int
    remainders: dict[str, float]
    projector: bool


def to_adapter(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    trained_a: bool = False,
    progress: bool = True,
) -> Converted:
    """Write an official checkpoint, W_res + B A, as a PEFT LoRA on the untouched W0: lora_A = A, lora_B = B − B₀.

    B₀ = (W0 − W_res) A⁺ in float64, from the base's own weights. The adapter gives the model of the checkpoint but for
    the rounding of W_res to the checkpoint's dtype, which it does not repeat. It is saved in float32 with
    ``lora_alpha = r`` (scaling 1) and a ``kore.json``; a projector that was trained goes with it as a module to save.
    Every other weight of the checkpoint must be the base's. Weights are read one layer at a time: in memory are the
    adapter and some copies of one layer.

    Args:
        source: The official checkpoint, safetensors files in any of the official or Hugging Face names.
        base: The untouched Hugging Face model, a directory.
        output: Where the adapter goes; one that is there is replaced.
        trained_a: A was trained too. The result has rank 2r: lora_A = [A; A₀], lora_B = [B, −B₀], with B₀A₀ the
            rank-r matrix nearest to W0 − W_res.
        progress: Show a progress bar on an interactive terminal.

    Raises:
        ArtifactError: The checkpoint is incomplete or broken, has weights that an adapter cannot carry, or its A and
            W_res do not belong together on this base; the message names the layers.
        ModelError: The base cannot be read.
    """
    check_output(output, source, base)
    official, base = Checkpoint(source), Path(base)
    model = lazy_model(base)
    fingerprint = model_fingerprint(model)
    parameters = dict(model.named_parameters())
    names = by_role(parameters, str(base))
    layers = _layers(official, parameters, names)
    projector = _check_rest(official, parameters, names, layers)
    rank = official.tensors[official.roles[f"{next(iter(layers))}.{A_NAME}"]].shape[0]
    target_rank = 2 * rank if trained_a else rank
    projector_module = projector_name(model) if projector else None
    peft_model: Any = wrap_lora(
        model, list(layers.values()), target_rank, target_rank, "auto" if projector else None, seed=0
    )
    adapter = sum(parameter.nbytes for name, parameter in peft_model.named_parameters() if ".lora_" in name)
    _log.info("the adapter has %s, held in memory until it is written", format_bytes(adapter))
    remainders = _fill(peft_model, official, parameters, layers, trained_a, progress)
    _check_remainders(remainders, official, base, trained_a)
    if projector_module is not None:
        copy = peft_model.get_base_model().get_submodule(projector_module).modules_to_save["default"]
        for name, parameter in copy.named_parameters():
            parameter.data = official[official.roles[role_of(f"{projector_module}.{name}")]]
    peft_model.kore_info = {
        "method": "official",
        "a_frozen": not trained_a,
        "rank": target_rank,
        "base_fingerprint": fingerprint,
    }
    save_adapter(peft_model, output, extra={"converted_from": str(source), "remainders": remainders})
    return Converted(Path(output), target_rank, remainders, projector)


def check_output(output: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raise ConfigError when the result would replace one of the directories it is made from."""
    for source in sources:
        if Path(source).exists() and Path(output).exists() and Path(output).samefile(source):
            raise ConfigError(f"--output: {output} is what the result is made from; choose another directory")


def _layers(official: Checkpoint, parameters: dict[str, nn.Parameter], names: dict[str, str]) -> dict[str, str]:
    """Roles of the split layers with the names of their modules, after checking their parts and shapes."""
    suffix = f".{RESIDUAL_NAME}"
    found = [role.removesuffix(suffix) for role in official.roles if role.endswith(suffix)]
    if not found:
        raise ArtifactError(
            f"{official.directory}: not an official checkpoint, no layer of it has {RESIDUAL_NAME}, {A_NAME}, {B_NAME}"
        )
    layers = {}
    ranks = set()
    for layer in found:
        name = names.get(f"{layer}.weight")
        if name is None:
            raise ArtifactError(f"{official.directory}: the base has no layer {layer}; it is of another model")
        d_out, d_in = parameters[name].shape
        shapes = {}
        for part in (A_NAME, B_NAME, RESIDUAL_NAME):
            stored = official.roles.get(f"{layer}.{part}")
            if stored is None:
                raise ArtifactError(f"{official.directory}: {layer}.{part} is missing; the checkpoint is incomplete")
            shapes[part] = official.tensors[stored].shape
        r = shapes[A_NAME][0]
        expected = {A_NAME: (r, d_in), B_NAME: (d_out, r), RESIDUAL_NAME: (d_out, d_in)}
        for part, shape in expected.items():
            if shapes[part] != shape:
                raise ArtifactError(
                    f"{official.directory}: {layer}.{part} is {shapes[part]}, expected {shape} on this base"
                )
        ranks.add(r)
        layers[layer] = name.removesuffix(".weight")
    if len(ranks) > 1:
        raise ArtifactError(f"{official.directory}: expected one rank, found {sorted(ranks)}")
    order = {name: index for index, name in enumerate(parameters)}
    return dict(sorted(layers.items(), key=lambda item: order[f"{item[1]}.weight"]))


def _check_rest(
    official: Checkpoint, parameters: dict[str, nn.Parameter], names: dict[str, str], layers: dict[str, str]
) -> bool:
    """Compare every weight that is not W_res, A or B with the base's. Returns whether the projector was trained."""
    split = {f"{layer}.{part}" for layer in layers for part in (A_NAME, B_NAME, RESIDUAL_NAME)}
    biases = {f"{layer}.{BIAS_NAME}": f"{layer}.bias" for layer in layers}
    rest = {biases.get(role, role): stored for role, stored in official.roles.items() if role not in split}
    in_base = {name for name in names if name.removesuffix(".weight") not in layers}
    if "lm_head.weight" in rest and "lm_head.weight" not in in_base:
        names = {**names, "lm_head.weight": names["embed_tokens.weight"]}
        in_base.add("lm_head.weight")
    if unknown := sorted(rest.keys() - in_base):
        raise ArtifactError(
            f"{official.directory}: {rest[unknown[0]]} is no weight of the base ({len(unknown)} such weights); give "
            "the base it was made from"
        )
    absent = sorted(in_base - rest.keys())
    if not any(role.startswith(VISION) for role in rest):  # the original LLaVA code loads its vision tower by itself
        absent = [role for role in absent if not role.startswith(VISION)]
    if absent:
        raise ArtifactError(
            f"{official.directory}: {absent[0]} is missing ({len(absent)} such weights); the checkpoint is incomplete, "
            "or made from another base"
        )
    changed = [role for role, stored in rest.items() if not _same(role, official[stored], parameters[names[role]])]
    others = [role for role in changed if not role.startswith(PROJECTOR)]
    if others:
        raise ArtifactError(
            f"{official.directory}: {len(others)} weights that an adapter does not carry are not those of the base, "
            f"for example {others[0]}: either they were trained, or it was made from another base"
        )
    return bool(changed)


def _same(role: str, ours: Tensor, base: Tensor) -> bool:
    """Whether two weights are equal but for rounding to the coarser of their dtypes."""
    if role in ROWS_MAY_DIFFER:
        rows = min(len(ours), len(base))
        ours, base = ours[:rows], base[:rows]
    if ours.shape != base.shape:
        return False
    coarse = max((torch.finfo(tensor.dtype) for tensor in (ours, base)), key=lambda info: info.eps)
    floor = max(torch.finfo(tensor.dtype).smallest_normal for tensor in (ours, base))
    return all(
        torch.allclose(a.float(), b.float(), rtol=coarse.eps, atol=floor)
        for a, b in zip(ours.split(_ROWS), base.split(_ROWS), strict=True)
    )


def _fill(
    peft_model: Any,
    official: Checkpoint,
    parameters: dict[str, nn.Parameter],
    layers: dict[str, str],
    trained_a: bool,
    progress: bool,
) -> dict[str, float]:
    """Set lora_A and lora_B of every layer. Returns the remainders."""
    from tqdm import tqdm

    base, remainders = peft_model.get_base_model(), {}
    with tqdm(total=len(layers), desc="layers", unit="layer", disable=None if progress else True) as bar:
        for layer, name in layers.items():
            A, B, residual = (official[official.roles[f"{layer}.{part}"]] for part in (A_NAME, B_NAME, RESIDUAL_NAME))
            weight = parameters[f"{name}.weight"].data
            if trained_a:
                taken = lowest_rank(weight, residual, A)
                lora_a, lora_b = torch.cat([A.double(), taken.A]), torch.cat([B.double(), -taken.B], dim=1)
            else:
                taken = initial_factor(weight, residual, A)
                lora_a, lora_b = A, B.double() - taken.B
            module = base.get_submodule(name)
            module.lora_A["default"].weight.data = lora_a.float()
            module.lora_B["default"].weight.data = lora_b.float()
            remainders[layer] = taken.remainder
            bar.update()
    return remainders


def _check_remainders(remainders: dict[str, float], official: Checkpoint, base: Path, trained_a: bool) -> None:
    wrong = [layer for layer, remainder in remainders.items() if not remainder <= 1]
    if not wrong:
        return
    worst = max(wrong, key=lambda layer: remainders[layer])
    named = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
    found = (
        f"{official.directory}: in {len(wrong)} of {len(remainders)} layers ({named}) W0 − W_res is not B₀A; "
        f"of {worst} is left {remainders[worst]:.3g} times what rounding explains. "
    )
    if trained_a:
        raise ArtifactError(f"{found}It has not the rank of A either: {base} is not the model that was split")
    raise ArtifactError(
        f"{found}Either A was trained, as the official v1 and Qwen scripts do: --trained-a makes an adapter of twice "
        f"the rank; or {base} is not the model that was split"
    )
