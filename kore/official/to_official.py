"""From a PEFT adapter and its base model to an official checkpoint."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from kore.adapter.files import KORE_FILE, read_info
from kore.artifacts import atomic_directory, atomic_write, read_json
from kore.errors import ArtifactError, ConfigError
from kore.merging import copy_settings
from kore.models import check_fingerprint
from kore.official.base import is_original_llava, lazy_model, read_settings
from kore.official.checkpoint import Checkpoint, write_shards
from kore.official.factors import split
from kore.official.names import A_NAME, B_NAME, BIAS_NAME, RESIDUAL_NAME, is_language_linear, role_of
from kore.official.to_adapter import ROWS_MAY_DIFFER, Converted, check_output

FORMS = ("lossless", "paper")
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHARD_BYTES = 2 << 30
_SETTINGS = {
    "architectures": ["CovSVDLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_oursvd_llama.CovSVDLlamaConfig",
        "AutoModelForCausalLM": "modeling_oursvd_llama.CovSVDLlamaForCausalLM",
    },
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Adapter:
    """An adapter's tensors by the role of their layer or module, and the scaling of each layer.

    ``rank`` is that of the checkpoint, to which factors of a lower rank are padded with zeros; ``folded``: the second
    half of each A and B is constant and goes into W_res.
    """

    tensors: Checkpoint
    A: dict[str, str]
    B: dict[str, str]
    whole: dict[str, str]
    scaling: dict[str, float]
    rank: int
    folded: bool

    def stored_rank(self, layer: str) -> int:
        """Rows of A in the adapter's file."""
        return self.tensors.tensors[self.A[layer]].shape[0]


def to_official(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    form: str = "lossless",
    like: str | os.PathLike[str] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool = True,
) -> Converted:
    """Write W0 + s·B·A as an official checkpoint: ``weight_residual``, ``BLinear`` (A) and ``ALinear`` (B, bias).

    The official checkpoint of a model is not unique: W_res + (B₀ + sB) A is the same for every B₀, with the same
    gradient in B.

    - ``form="lossless"``: B₀ = 0. W_res is W0 bit for bit, A and B keep the adapter's dtype. The official code makes
      such a checkpoint too, with ``--singular_aware_2``.
    - ``form="paper"``: B₀ = W0 A⁺, so that W_res = W0 − W0 P with P onto the rows of A, as ``--singular_aware`` writes
      it; everything in W0's dtype, whose rounding of W_res moves the model a little.

    An adapter whose A is trained (``train_a``: rank 2r, the halves A₀ and −B₀ constant) becomes in the paper's form
    W_res = W0 − s·B₀A₀ with A and B of rank r, which the official code trains on; in the lossless form it keeps its
    rank 2r, all of which the official code would train.

    An official checkpoint has one rank, lora_r. Where the adapter has a rank for each layer (``rank: energy:τ``), A and
    B are padded to the largest with rows and columns of zeros: the model is the same, and so is its training, in which
    the gradients of the padding are zero.

    The language model's linear layers that the adapter leaves alone get A = 0 and B = 0. Weights are read and written
    one shard at a time: in memory are one shard, 2 GiB unless said otherwise, and some copies of one layer.

    Args:
        adapter: A LoRA directory of KORE or PEFT.
        base: The untouched model it belongs to, a directory.
        output: Where the checkpoint goes; one that is there is replaced.
        form: B₀, see above.
        like: An official checkpoint of the same model, for example the untrained one of the official scripts: its
            names, ``config.json`` and remote code are used. Without it they are the base's, with the official fields
            ``lora_r``, ``auto_map`` and ``architectures``.
        shard_bytes: Size of a shard.
        progress: Show a progress bar on an interactive terminal.

    Raises:
        ArtifactError: A file is missing or broken, or the adapter has no official form; the message says why.
        ModelError: The adapter belongs to another model.
    """
    from tqdm import tqdm

    if form not in FORMS:
        raise ConfigError(f"form: expected {' or '.join(FORMS)}, got {form!r}")
    base = Path(base)
    check_output(output, adapter, base, *([] if like is None else [like]))
    settings, weights = read_settings(base), Checkpoint(base)
    if (Path(adapter) / KORE_FILE).is_file() and not is_original_llava(settings):
        check_fingerprint(read_info(adapter)["base_fingerprint"], lazy_model(base), f"the adapter {adapter}")
    lora = _read_adapter(Path(adapter), form)
    layers = _layers(lora, weights)
    pattern = None if like is None else Checkpoint(like)
    pieces = {piece.role: piece for piece in _pieces(lora, weights, layers, pattern)}
    untouched = [role for role in layers if role not in lora.A]
    if untouched:
        _log.info("%d layers are not adapted (%s, …): their A and B are 0", len(untouched), untouched[0])
    if like is None and settings.get("model_type") == "llava" and not is_original_llava(settings):
        _log.warning(
            "names and settings are those of the Hugging Face LLaVA; the official code reads those of the original "
            "LLaVA repository, which --like takes from a checkpoint of it"
        )
    with atomic_directory(output) as directory:
        copy_settings(base if like is None else Path(like), directory)
        fields = settings | _SETTINGS if like is None else read_settings(Path(like))
        atomic_write(directory / "config.json", json.dumps({**fields, "lora_r": lora.rank}, indent=2) + "\n")
        with tqdm(total=len(pieces), desc="weights", disable=None if progress else True) as bar:

            def make(role: str) -> dict[str, Tensor]:
                bar.update()
                piece = pieces[role]
                return dict(zip(piece.results.values(), _make(piece, lora, weights, form, pattern), strict=True))

            write_shards(directory, {role: piece.bytes for role, piece in pieces.items()}, make, shard_bytes)
    return Converted(Path(output), lora.rank, {}, bool(lora.whole))


def _read_adapter(directory: Path, form: str) -> _Adapter:
    config = read_json(directory / "adapter_config.json")
    _check_config(directory, config)
    tensors = Checkpoint(directory, single=_WEIGHTS)
    A: dict[str, str] = {}
    B: dict[str, str] = {}
    whole: dict[str, str] = {}
    scaling: dict[str, float] = {}
    for name in tensors.tensors:
        module = name.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", module):
            (A if match[2] == "A" else B)[role_of(match[1])] = name
            if match[2] == "A":
                scaling[role_of(match[1])] = _scaling(config, match[1], tensors.tensors[name].shape[0])
        elif "lora_" in module:
            raise ArtifactError(f"{directory}: {name} has no place in an official checkpoint, which knows A and B only")
        else:
            whole[role_of(module.replace(".modules_to_save.", "."))] = name
    if A.keys() != B.keys() or not A:
        odd = sorted(A.keys() ^ B.keys())
        raise ArtifactError(
            f"{directory / _WEIGHTS}: {odd[0] + ' has only one of' if odd else 'has no'} lora_A and lora_B"
        )
    ranks = sorted({tensors.tensors[name].shape[0] for name in A.values()})
    halves = (directory / KORE_FILE).is_file() and bool(read_info(directory).get("constant_halves"))
    if halves and form == "lossless":
        _log.warning(
            "the adapter's A is trained, and its second half is constant; the official code would train both halves of "
            "this checkpoint. form paper puts the constant half into W_res"
        )
    elif len(ranks) > 1:
        _log.info("layers of rank %d to %d are padded with zeros to one rank, lora_r", ranks[0], ranks[-1])
    folded = halves and form == "paper"
    return _Adapter(tensors, A, B, whole, scaling, ranks[-1] // 2 if folded else ranks[-1], folded)


def _scaling(config: Any, module: str, rank: int) -> float:
    """What PEFT multiplies B A of a layer by."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_config(directory: Path, config: Any) -> None:
    """Refuse what W0 + s·B·A with one s does not describe."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise ArtifactError(f"{directory / 'adapter_config.json'}: expected the settings of a LoRA adapter")
    for key in ("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication"):
        if config.get(key):
            raise ArtifactError(f"{directory}: an adapter with {key} has no official form, which is W_res + B A")
    if config.get("bias", "none") != "none":
        raise ArtifactError(f"{directory}: it trains biases (bias={config['bias']!r}), which is not supported")


def _layers(lora: _Adapter, weights: Checkpoint) -> list[str]:
    """Roles of the linear layers of the language model; the adapter must lie on them and fit them."""
    shapes = {role: weights.tensors[name].shape for role, name in weights.roles.items()}
    layers = {role.removesuffix(".weight"): shape for role, shape in shapes.items() if is_language_linear(role, shape)}
    for role in lora.A:
        if role not in layers:
            raise ArtifactError(
                f"{lora.tensors.directory}: it adapts {role}; an official checkpoint splits the linear layers of the "
                "language model only"
            )
        found = tuple(lora.tensors.tensors[names[role]].shape for names in (lora.B, lora.A))
        d_out, d_in = layers[role]
        expected = ((d_out, lora.stored_rank(role)), (lora.stored_rank(role), d_in))
        if found != expected:
            raise ArtifactError(f"{lora.tensors.directory}: B and A of {role} are {found}, expected {expected}")
    for role, name in lora.whole.items():
        if shapes.get(role) != lora.tensors.tensors[name].shape:
            raise ArtifactError(f"{lora.tensors.directory}: {name} is no weight of the base, or of another shape")
    return list(layers)


@dataclass(frozen=True)
class _Piece:
    """What one weight of the base becomes: its role, and the roles, names and bytes of the results."""

    role: str
    results: dict[str, str]
    bytes: int


def _pieces(lora: _Adapter, weights: Checkpoint, layers: list[str], pattern: Checkpoint | None) -> list[_Piece]:
    """Every weight of the base in order, with names as the base's or as the pattern's where there is one."""
    split, pieces = set(layers), []
    for role, name in weights.roles.items():
        layer, _, part = role.rpartition(".")
        stored = weights.tensors[name]
        size = stored.bytes
        new = {role: name}
        if layer in split and part == "weight":
            new = {f"{layer}.{key}": f"{name.removesuffix(part)}{key}" for key in (A_NAME, B_NAME, RESIDUAL_NAME)}
            size += 4 * lora.rank * sum(stored.shape)
        elif layer in split:
            new = {f"{layer}.{BIAS_NAME}": f"{name.removesuffix(part)}{BIAS_NAME}"}
        if pattern is not None:
            if role.startswith("layers.") and (absent := sorted(new.keys() - pattern.roles.keys())):
                raise ArtifactError(f"{pattern.directory}: no official checkpoint of this model, it lacks {absent[0]}")
            new = {key: pattern.roles[key] for key in new if key in pattern.roles}
        if new:
            pieces.append(_Piece(role, new, size))
    made = {key for piece in pieces for key in piece.results}
    if pattern is not None and (unknown := sorted(pattern.roles.keys() - made)):
        raise ArtifactError(f"{pattern.directory}: {pattern.roles[unknown[0]]} has nothing in the base; another model")
    return pieces


def _make(piece: _Piece, lora: _Adapter, weights: Checkpoint, form: str, pattern: Checkpoint | None) -> list[Tensor]:
    """The tensors of a piece, in the order of its results."""
    tensor = weights[weights.roles[piece.role]]
    if len(piece.results) == 3:
        return list(_split(piece.role.removesuffix(".weight"), tensor, lora, form))
    if piece.role in lora.whole:
        ours = lora.tensors[lora.whole[piece.role]]
        return [ours.to(tensor.dtype) if form == "paper" else ours]
    if pattern is not None and piece.role in ROWS_MAY_DIFFER:
        (name,) = piece.results.values()
        rows = pattern.tensors[name].shape[0]
        if rows > len(tensor):
            raise ArtifactError(f"{pattern.directory}: {name} has {rows} rows, the base {len(tensor)}; another model")
        return [tensor[:rows]]
    return [tensor]


def _split(layer: str, weight: Tensor, lora: _Adapter, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and W_res of a layer."""
    if layer not in lora.A:
        d_out, d_in = weight.shape
        return weight.new_zeros(lora.rank, d_in), weight.new_zeros(d_out, lora.rank), weight
    A, B = (lora.tensors[names[layer]] for names in (lora.A, lora.B))
    scaled = B.double() * lora.scaling[layer]
    if lora.folded:
        rank = len(A) // 2
        residual = (weight.double() + scaled[:, rank:] @ A[rank:].double()).to(weight.dtype)
        A, B = A[:rank].to(weight.dtype), scaled[:, :rank].to(weight.dtype)
    elif form == "lossless":
        residual, B = weight, scaled.to(B.dtype)
    else:
        A = A.to(weight.dtype)
        residual, initial = split(weight, A)
        B = (initial + scaled).to(weight.dtype)
    missing = lora.rank - len(A)
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)), residual
