"""PEFT's ``target_modules`` and ``modules_to_save`` for an exact set of modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from kore.errors import ConfigError
from kore.models import projector_name


def peft_target_modules(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """``target_modules`` that stock PEFT resolves to exactly the modules ``names`` of an unadapted model.

    The last parts of the names where those select nothing else (``["q_proj", "v_proj"]``); else one regular
    expression over the layer numbers; else one over the names themselves.
    """
    wanted = set(names)
    every = [name for name, _ in model.named_modules() if name]
    suffixes = sorted({name.rpartition(".")[2] for name in wanted})
    if {name for name in every if name.rpartition(".")[2] in suffixes} == wanted:
        return suffixes
    pattern = _pattern(wanted)
    if {name for name in every if re.fullmatch(pattern, name)} == wanted:
        return pattern
    return "|".join(re.escape(name) for name in sorted(wanted))


def _pattern(names: set[str]) -> str:
    """One expression for all names: parent modules with layer numbers left open, and the last parts in them."""
    leaves: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parent = re.sub(r"(?<![^.])\d+(?=\\\.)", r"\\d+", re.escape(f"{parent}." if parent else ""))
        leaves.setdefault(parent, set()).add(re.escape(leaf))
    return "|".join(f"{parent}({'|'.join(sorted(leaf))})" for parent, leaf in sorted(leaves.items()))


def peft_modules_to_save(model: nn.Module, modules: str | Sequence[str] | None, targets: Iterable[str]) -> list[str]:
    """PEFT's names of the modules to train in full: none, the projector (``"auto"``), or those that names select.

    Raises:
        ConfigError: A name selects no module, several, or one that holds or lies in an adapted layer.
    """
    if modules is None:
        return []
    every = [name for name, _ in model.named_modules() if name]
    if modules == "auto":
        projector = projector_name(model)
        chosen = [] if projector is None else [projector]
    else:
        wanted = [modules] if isinstance(modules, str) else list(modules)
        chosen = []
        for want in wanted:
            # The same test as PEFT's, which takes a name for the end of a module name.
            found = [name for name in every if name.endswith(want)]
            if len(found) != 1:
                what = "no module" if not found else f"{len(found)} modules ({found[0]}, {found[1]}, …)"
                raise ConfigError(f"modules_to_save: {want!r} names {what}; give the name of one module")
            chosen.append(found[0])
    for name in chosen:
        for target in targets:
            if target == name or target.startswith(f"{name}.") or name.startswith(f"{target}."):
                raise ConfigError(
                    f"modules_to_save: {name} holds the adapted layer {target}; train it in full or adapt it, not both"
                )
    leaves = [name.rpartition(".")[2] for name in chosen]
    return [leaf if sum(other.endswith(leaf) for other in every) == 1 else name for name, leaf in zip(chosen, leaves)]
