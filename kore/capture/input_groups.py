"""Finds at run time which layers read the same input, so that one covariance serves them all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from kore.capture.accumulator import Accumulator
from kore.covariance import Group
from kore.errors import KoreError


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclass
class InputGroup:
    """Layers that read the same input: the tensor they read in the running forward pass, and who has read it.

    ``itemsize`` is the size of one of its numbers in bytes.
    """

    modules: list[str]
    masked: bool
    accumulator: Accumulator
    itemsize: int
    forming: bool = False
    rounds: int = 0
    seen: set[str] = field(default_factory=set)
    _current: weakref.ReferenceType[torch.Tensor] | None = None
    _current_version: int = 0

    def reads(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is the very tensor, unchanged since, that the group is reading now."""
        return self._current is not None and self._current() is x and self._current_version == _version(x)

    def start_round(self, module: str, x: torch.Tensor) -> None:
        """``module`` is the first to read ``x``."""
        self._current, self._current_version = weakref.ref(x), _version(x)
        self.seen = {module}
        self.rounds += 1

    def end_pass(self) -> None:
        self._current, self.seen, self.rounds, self.forming = None, set(), 0, False

    def missing(self) -> list[str]:
        """Members that have not read the tensor that other members have read."""
        if not self.seen or len(self.seen) == len(self.modules):
            return []
        return [module for module in self.modules if module not in self.seen]

    def describe(self) -> Group:
        return Group(self.modules[0], tuple(self.modules), self.accumulator.dim, self.accumulator.tokens())


class InputGroups:
    """Sends every distinct layer input of a forward pass once to an accumulator.

    Layers form a group when, in the pass in which they first run, they read the same tensor object at the same
    version. Weak references to the tensors make this exact: an identity cannot be recycled unnoticed, and no
    activation is kept alive. In every later pass the members must again read one tensor.

    Args:
        masked: The modules whose input rows are the batch's tokens, of which not all may count.
        new_accumulator: Makes the accumulator of a group of given d_in, whose input is on the given device.
        share: False gives every module its own group.
    """

    def __init__(
        self, masked: set[str], new_accumulator: Callable[[int, torch.device], Accumulator], share: bool = True
    ) -> None:
        self.groups: list[InputGroup] = []
        self._masked, self._new_accumulator, self._share = masked, new_accumulator, share
        self._group_of: dict[str, InputGroup] = {}

    def observe(self, module: str, x: torch.Tensor) -> Accumulator | None:
        """Register that ``module`` reads ``x``. Returns the accumulator to add x to, None if that was done."""
        group = self._group_of.get(module)
        if group is None:
            group = next((g for g in self.groups if self._may_join(g, module, x)), None)
            if group is not None:
                group.modules.append(module)
                group.seen.add(module)
                self._group_of[module] = group
                return None
            accumulator = self._new_accumulator(x.shape[-1], x.device)
            group = self._new_group([module], accumulator, x.element_size())
            group.forming = True
        elif module not in group.seen and group.reads(x):
            group.seen.add(module)
            return None
        elif group.missing():
            raise _disagreement(group)
        group.start_round(module, x)
        return group.accumulator

    def _may_join(self, group: InputGroup, module: str, x: torch.Tensor) -> bool:
        alike = group.masked == (module in self._masked)
        return self._share and group.forming and group.rounds == 1 and alike and group.reads(x)

    def _new_group(self, modules: Iterable[str], accumulator: Accumulator, itemsize: int) -> InputGroup:
        modules = list(modules)
        group = InputGroup(modules, modules[0] in self._masked, accumulator, itemsize)
        self.groups.append(group)
        self._group_of.update(dict.fromkeys(modules, group))
        return group

    def end_pass(self) -> None:
        """Close a forward pass. Raises KoreError when a group's members did not all read the same inputs."""
        for group in self.groups:
            if group.missing():
                raise _disagreement(group)
        for group in self.groups:
            group.end_pass()

    def add(self, group: Group, device: torch.device, itemsize: int) -> Accumulator:
        """Add a group that an earlier run or another process has found; returns its empty accumulator."""
        return self._new_group(group.modules, self._new_accumulator(group.dim, device), itemsize).accumulator

    def sort(self, order: Sequence[Group]) -> None:
        """Put the groups into the order of ``order``, which has them all."""
        self.groups = [self._group_of[group.name] for group in order]

    def __contains__(self, module: str) -> bool:
        return module in self._group_of

    def __getitem__(self, module: str) -> InputGroup:
        return self._group_of[module]

    def never_ran(self, modules: Sequence[str]) -> list[str]:
        """Those of ``modules`` that no pass has run."""
        return [module for module in modules if module not in self._group_of]


def agree(processes: Sequence[Sequence[Group]]) -> list[Group]:
    """The groups that several processes have found, tokens added up; a process may lack some.

    Raises KoreError when two processes group a module differently.
    """
    together: dict[frozenset[str], Group] = {}
    members: dict[str, frozenset[str]] = {}
    for number, groups in enumerate(processes):
        for group in groups:
            key = frozenset(group.modules)
            odd = next((module for module in group.modules if members.setdefault(module, key) != key), None)
            if odd is not None:
                raise KoreError(
                    f"{odd}: process {number} found other layers that read its input than a process before it; "
                    "pass share_inputs=False"
                )
            known = together.get(key)
            together[key] = group if known is None else replace(known, tokens=known.tokens + group.tokens)
    return list(together.values())


def _disagreement(group: InputGroup) -> KoreError:
    reader = next(module for module in group.modules if module in group.seen)
    return KoreError(
        f"{group.missing()[0]} and {reader} read one input in the batch in which they first ran, "
        "but not in this one; pass share_inputs=False"
    )
