"""Layers that read one input and whose A have one row space: A_i = R_i A_1, so h = x A_1ᵀ serves all of them."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import kore_kernels as kk
from kore.acceleration.hooks import partitioned

if TYPE_CHECKING:
    from kore.acceleration.linear import FusedLinear

log = logging.getLogger("kore")

# What float64, in which the R are solved, cannot tell from nothing.
_NOISE = 1e-13

# How often A may turn out to be another tensor before the layers run singly: some wrappers make a new one in each pass.
_RENEWALS = 8


def rotations(As: Sequence[Tensor]) -> list[Tensor | None]:
    """R_i (r, r) with A_i = R_i A_1 in the dtype of A_i, None where the rows of A_i lie in no such space.

    R_i is accepted if ‖A_i − R_i A_1‖ ≤ ε‖A_i‖ (Frobenius) for the rounded R_i, with ε the resolution of the dtype
    (1.2e-7, 9.8e-4, 7.8e-3 for float32, float16, bfloat16): rounding A_i to its dtype moves it by a third as much.
    So A of one space that were rounded in bfloat16 and are held in float32 are refused. Solved in float64 from the QR
    decomposition of A_1ᵀ; row scales of A_1 do no harm, and an A_1 of lower rank fits nothing but itself.

    Args:
        As: (r, d_in) each, r < d_in, on one device, in one dtype.
    """
    first = As[0].detach()
    r = first.shape[0]
    Q, T = torch.linalg.qr(first.double().mT)
    found: list[Tensor | None] = [torch.eye(r, dtype=first.dtype, device=first.device)]
    for A in As[1:]:
        exact = A.detach().double()
        R = torch.linalg.solve_triangular(T.mT, exact @ Q, upper=False, left=False).to(A.dtype)
        error = torch.linalg.norm(exact - R.double() @ first.double()) / torch.linalg.norm(exact)
        found.append(R if error <= max(torch.finfo(A.dtype).eps, _NOISE) else None)
    return found


def find_groups(layers: Sequence[FusedLinear]) -> list[list[FusedLinear]]:
    """Those of some sibling layers that share a basis, in groups of two or more."""
    from kore.acceleration.linear import parts

    groups = []
    alike: dict[Any, list[FusedLinear]] = {}
    for layer in layers:
        A = parts(layer).A
        if type(A) is nn.Parameter and not A.is_meta and 0 < A.shape[0] < A.shape[1]:
            adapter = layer.active_adapters[0]
            p = getattr(layer.lora_dropout[adapter], "p", 0.0)
            if p == 0:
                key = adapter, A.shape, A.dtype, A.device, layer.scaling[adapter]
                alike.setdefault(key, []).append(layer)
    for left in alike.values():
        while len(left) > 1:
            found = rotations([parts(layer).A for layer in left])
            group = [layer for layer, R in zip(left, found) if R is not None]
            left = [layer for layer, R in zip(left, found) if R is None]
            if len(group) > 1:
                groups.append(group)
    return groups


class Group:
    """Sibling layers with one input and one row space of A, computed together by :func:`kore_kernels.lora_fa_linears`.

    One member leads: the first that was ever called. Its call computes all outputs. The others take theirs when they
    are called with the very same input under the same circumstances, and run singly otherwise; each output is handed
    out once, and none is kept longer than the input lives or past a backward pass.

    U of the operation is A_1ᵀ, the parameter itself; only the R_i are computed and kept, and computed again when an A
    was replaced or written. (A write through ``A.data`` leaves no trace; call ``accelerate`` again.)

    That the members do read one input is seen when they run. A pass in which one reads another gives right results
    and wasted work; a group that wastes more often than it helps is dissolved. That waits until no pass is left whose
    backward pass may have to repeat its forward pass in the same way (gradient checkpointing): until a B was changed.

    Attributes:
        members: The layers.
        names: Their names in the model.
    """

    def __init__(self, members: Iterable[FusedLinear], names: Iterable[str]) -> None:
        self.members, self.names = tuple(members), tuple(names)
        self._start()
        for member in self.members:
            member._fused_group = self

    def _start(self) -> None:
        self._bases: dict[str, _Basis] = {}
        self._held: _Held | None = None
        self._trained: _Seen | None = None
        self._leader: int | None = None
        self._used = self._unused = self._renewed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def forget(self) -> None:
        """Drop what was computed from the parameters."""
        self._bases.clear()
        self._held = None

    def dissolve(self) -> None:
        """Let the layers run singly from now on."""
        log.info("%s: run singly from now on, they do not read one input", ", ".join(self.names))
        self._held = None
        for member in self.members:
            member._fused_group = None

    def output(self, layer: FusedLinear, x: Tensor) -> Tensor | None:
        """y of ``layer`` for ``x``, which ``layer`` covers; None where the layer has to run by itself."""
        from kore.acceleration.linear import covers, dropout_p, parts

        index = next((i for i, member in enumerate(self.members) if member is layer), None)
        # Inference tensors do not count the writes to them, subclasses may be anything.
        if index is None or type(x) not in (Tensor, nn.Parameter) or x.is_inference():
            return None
        # DeepSpeed gathers the parameters of one layer at a time, and gives each layer another tensor for its input.
        if partitioned(parts(layer).A):
            return None
        held, self._held = self._held, None
        if held is not None:
            y = held.take(index, x, parts(layer))
            if y is not None:
                if held.outputs:
                    self._held = held
                else:
                    self._used += 1
                return y
            self._unused += 1
        if self._leader not in (None, index):
            return None
        adapter = layer.active_adapters[0]
        for member in self.members:
            if member is not layer and not (covers(member, x) and member.active_adapters[0] == adapter):
                return None
            if dropout_p(member):
                return None
        every = [parts(member) for member in self.members]
        Bs = [part.B for part in every]
        if self._unused > self._used + 1 and not (self._trained and self._trained.unchanged(Bs)):
            self.dissolve()
            return None
        if any(part.scaling != every[0].scaling or part.B.is_inference() for part in every):
            return None
        Rs = self._rotations(adapter, [part.A for part in every])
        if Rs is None:
            return None
        if torch.is_grad_enabled():
            self._trained = _Seen.of(Bs)
        ys = kk.lora_fa_linears(
            x, [part.weight for part in every], [part.bias for part in every], every[0].A.mT, Rs, Bs, every[0].scaling
        )
        outputs = dict(enumerate(ys))
        y = outputs.pop(index)
        self._leader = index
        self._held = _Held(x, every, outputs)
        return y

    def _rotations(self, adapter: str, As: list[Tensor]) -> list[Tensor] | None:
        basis = self._bases.get(adapter)
        if basis is None or not basis.seen.unchanged(As):
            self._renewed += basis is not None
            if self._renewed > _RENEWALS:
                self.dissolve()
                return None
            # The modes are those of selective checkpointing, which counts operations.
            with torch.no_grad(), _disable_current_modes():
                same = len({(A.shape, A.dtype) for A in As}) == 1 and As[0].shape[0] < As[0].shape[1]
                found = rotations(As) if same else [None]
            shared = [R for R in found if R is not None]
            basis = self._bases[adapter] = _Basis(_Seen.of(As), shared if len(shared) == len(As) else None)
        return basis.Rs


class _Seen(NamedTuple):
    """Tensors, and in which state they were."""

    tensors: tuple[Tensor, ...]
    states: tuple[Any, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Seen:
        return cls(tuple(tensors), tuple(_state(t) for t in tensors))

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same objects, with nothing written to them since."""
        return all(a is b for a, b in zip(self.tensors, tensors)) and self.states == tuple(_state(t) for t in tensors)


def _state(tensor: Tensor) -> Any:
    return tensor._version, tensor.dtype, tensor.device, tensor.requires_grad


class _Basis(NamedTuple):
    """The R_i, or None where the A have no common row space, and the A they belong to."""

    seen: _Seen
    Rs: list[Tensor] | None


class _Held:
    """Outputs that wait for their layers, and what they belong to."""

    def __init__(self, x: Tensor, every: Sequence[Any], outputs: dict[int, Tensor]) -> None:
        self.outputs = outputs
        # The outputs go with x, which is not held here, or when a backward pass uses up what they were saved with.
        self._x = weakref.ref(x, lambda _: outputs.clear())
        node = next(iter(outputs.values())).grad_fn
        if node is not None:
            node.register_prehook(functools.partial(_drop, weakref.ref(self)))
        self._x_state = _state(x)
        self._circumstances = _circumstances(x)
        self._parts = {i: (every[i].scaling, _Seen.of(_tensors(every[i]))) for i in outputs}

    def take(self, index: int, x: Tensor, parts: Any) -> Tensor | None:
        """The output of layer ``index``, if it is here and is what the layer would compute now."""
        if index not in self.outputs or self._x() is not x or self._x_state != _state(x):
            return None
        scaling, seen = self._parts[index]
        if self._circumstances != _circumstances(x) or scaling != parts.scaling:
            return None
        return self.outputs.pop(index) if seen.unchanged(_tensors(parts)) else None


def _drop(held: weakref.ref[_Held], _gradients: Any) -> None:
    found = held()
    if found is not None:
        found.outputs.clear()


def _tensors(parts: Any) -> list[Tensor]:
    return [t for t in (parts.weight, parts.bias, parts.A, parts.B) if t is not None]


def _circumstances(x: Tensor) -> Any:
    """What else an output depends on. Its graph belongs to the checkpointed region, known by its hooks, it began in."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    innermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.7 and later
    hooks = innermost(False) if innermost else None
    return torch.is_grad_enabled(), autocast, stream, hooks and id(hooks[1])
