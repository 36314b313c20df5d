"""One capture pass over the data, in one process or several."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore.capture.accumulator import Accumulator
from kore.capture.checkpoint import CaptureCheckpoint
from kore.capture.hooks import HookedModel, input_device, output_head
from kore.capture.input_groups import InputGroups, agree
from kore.capture.plan import MemoryPlan, PlannedGroup, free_bytes, make_plan
from kore.capture.selection import Selector
from kore.capture.storage import Storage
from kore.covariance import CovarianceSet, Group
from kore.distributed import Processes
from kore.errors import KoreError
from kore.models import language_model_linears, linear_shape, model_fingerprint, named_linears, resolve_targets
from kore.sizes import format_bytes
from kore.triangle import Triangle

NORMALIZE = ("none", "official")
log = logging.getLogger("kore")


@dataclass(frozen=True)
class Options:
    """What a capture computes and how; see :func:`kore.capture.capture_covariance`."""

    tokens: str
    normalize: str
    dtype: torch.dtype
    share_inputs: bool
    buffer_rows: int
    checkpoint_every: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise KoreError(f"normalize: expected one of {', '.join(NORMALIZE)}, got {self.normalize!r}")
        if self.dtype not in (torch.float32, torch.float64):
            raise KoreError(f"dtype: expected torch.float32 or torch.float64, got {self.dtype}")
        if self.buffer_rows < 1 or self.checkpoint_every < 1:
            raise KoreError("buffer_rows and checkpoint_every: expected at least 1")

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been written with, as JSON-serialisable values."""
        return {name: str(value) for name, value in asdict(self).items() if name != "progress"}


class Engine:
    """Captures covariances of one model: of the inputs of its layers, or what a subclass finds there.

    Attributes:
        names: The target layers, in model order.
        options: What is computed and how.
        processes: Those that capture together.
        result_type: What a capture gives.
        rows: What is summed, for messages.
    """

    result_type: type[CovarianceSet] = CovarianceSet
    rows = "input"

    def __init__(
        self, model: nn.Module, targets: str | Sequence[str] | None, options: Options, processes: Processes
    ) -> None:
        self.model, self.options, self.processes = model, options, processes
        self.names = resolve_targets(model, targets)
        self._linears, head = named_linears(model), output_head(model)
        self._text = set(language_model_linears(model)) | {n for n in self.names if self._linears[n] is head}
        self._selector = Selector(options.tokens, model)
        self._fingerprint = model_fingerprint(model)
        outside = [name for name in self.names if name not in self._text]
        if outside and options.tokens != "all":
            raise KoreError(
                f"tokens={options.tokens!r} selects tokens of the language model, and {outside[0]} is not in it "
                f"({len(outside)} such targets); leave it out of targets, or capture it with tokens='all'"
            )

    def checkpoint_folder(self, checkpoint: str | os.PathLike[str] | None) -> Path | None:
        """Where this process keeps its checkpoints."""
        if checkpoint is None:
            return None
        several = self.processes.count > 1
        return Path(checkpoint) / f"process-{self.processes.rank:05d}" if several else Path(checkpoint)

    def plan(self, batch: Mapping[str, Any] | None, storage: str, budget: int | None, again: bool) -> MemoryPlan:
        """Plan a capture from one forward pass of ``batch``; the processes agree. None where a process has none."""
        unused = Storage("packed", self.options.dtype)
        groups = self._new_groups(lambda dim, device: self._accumulator(unused, dim, device))
        with self.processes.fail_together():
            if batch is not None:
                hooked = self._hooked(self.names)
                with hooked.hooked(groups, accumulate=False):
                    hooked.forward(batch, 0)
                groups.end_pass()
        self._join(groups)
        again = all(self.processes.share(again))
        with self.processes.fail_together():
            plan = make_plan(
                self._planned(groups, self.names),
                storage,
                self.options.dtype,
                self.options.buffer_rows,
                budget,
                again,
                self.rows,
            )
        return replace(plan, windows=self.processes.share(plan.windows)[0])

    def announce(self, plan: MemoryPlan) -> None:
        """Show a plan, and warn where it takes more memory than is free."""
        if self.processes.rank == 0:
            if self.options.progress:
                from tqdm import tqdm

                tqdm.write(str(plan), file=sys.stderr)
            else:
                log.info("%s", str(plan).splitlines()[0])
        for device, need in plan.peak().items():
            free = free_bytes(device)
            if free is not None and need > free:
                log.warning(
                    "the covariances need %s on %s and %s are free; set a memory budget (memory_budget, "
                    "--memory-budget) to capture in several passes",
                    format_bytes(need),
                    device,
                    format_bytes(free),
                )

    def capture(
        self,
        batches: Iterable[Mapping[str, Any]],
        names: Sequence[str],
        storage: str,
        checkpoint: Path | None,
        *,
        planned: bool = False,
        label: str = "covariance",
    ) -> CovarianceSet:
        """The covariances of the layers ``names``, from one pass over ``batches``, summed over the processes.

        When a plan has not been announced, matrices are made when the first batch has run, after announcing it.
        """
        place = Storage("packed" if storage == "auto" else storage, self.options.dtype)

        def new_accumulator(dim: int, device: torch.device) -> Accumulator:
            accumulator = self._accumulator(place, dim, device)
            if planned:
                accumulator.place()
            return accumulator

        def announce() -> None:
            options, parts = self.options, self._planned(groups, names)
            self.announce(make_plan(parts, place.kind, options.dtype, options.buffer_rows, None, False, self.rows))

        groups = self._new_groups(new_accumulator)
        with self.processes.fail_together():
            done = self._feed(batches, names, groups, checkpoint, None if planned else announce, label)
        if not any(self.processes.share(done)):
            raise KoreError("batches: expected at least one batch, got none")
        described = self._join(groups)
        if idle := groups.never_ran(names):
            raise KoreError(
                f"{idle[0]}: the model never ran this module on the given data ({len(idle)} such modules); "
                "leave it out of targets or give data that uses it"
            )
        for group in described:
            if group.tokens == 0 and self.options.tokens != "all":
                raise KoreError(
                    f"tokens={self.options.tokens!r}: the batches hold no such token ({group.name} saw none)"
                )
        return self._result(groups, described)

    def _feed(
        self,
        batches: Iterable[Mapping[str, Any]],
        names: Sequence[str],
        groups: InputGroups,
        checkpoint: Path | None,
        announce: Callable[[], None] | None,
        label: str,
    ) -> int:
        """Run every batch that is not in the checkpoint, ``announce`` after the first; returns the number of all."""
        from tqdm import tqdm

        every = self.options.checkpoint_every
        iterator = iter(batches)
        saved = None if checkpoint is None else self._checkpoint(checkpoint, names, groups)
        done = 0 if saved is None else saved.resume(iterator)
        unsaved, quiet = 0, not self.options.progress or self.processes.rank > 0
        hooked = self._hooked(names)
        bar = tqdm(total=length_hint(batches) or None, initial=done, desc=label, unit="batch", disable=quiet or None)
        with hooked.hooked(groups), bar:
            for batch in iterator:
                hooked.forward(batch, done)
                groups.end_pass()
                if announce is not None:
                    announce()
                    announce = None
                for group in groups.groups:
                    group.accumulator.place()
                done += 1
                unsaved += 1
                bar.update()
                if saved is not None:
                    saved.see(batch)
                    if done % every == 0:
                        self._check_finite(groups)
                        saved.write(done)
                        unsaved = 0
        self._check_finite(groups)
        if saved is not None and unsaved:
            saved.write(done)
        return done

    def _planned(self, groups: InputGroups, names: Sequence[str]) -> Iterator[PlannedGroup]:
        """What has run, and after it what has not: it may yet, and may share no input."""
        scaled = torch.float32.itemsize if self.options.normalize == "official" else None
        for group in groups.groups:
            accumulator = group.accumulator
            yield PlannedGroup(tuple(group.modules), accumulator.dim, str(accumulator.device), scaled or group.itemsize)
        for name in groups.never_ran(names):
            device, itemsize = self._input_of(name)
            yield PlannedGroup((name,), self._dim(name), str(device), scaled or itemsize)

    def _join(self, groups: InputGroups) -> list[Group]:
        """Tell the other processes what groups there are; all have the same ones then, in the same order."""
        described = agree(self.processes.share([group.describe() for group in groups.groups]))
        for group in described:
            if group.name not in groups:
                groups.add(group, *self._input_of(group.name))
        groups.sort(described)
        return described

    def _result(self, groups: InputGroups, described: list[Group]) -> CovarianceSet:
        from kore_kernels import symmetrize_

        matrices: dict[str, torch.Tensor | Triangle] = {}
        for group in described:
            accumulator = groups[group.name].accumulator
            triangle = accumulator.place()
            self.processes.add_up(triangle)
            square = accumulator.storage.kind == "square"
            matrices[group.name] = symmetrize_(triangle.matrix) if square else triangle
        dtype = str(self.options.dtype).removeprefix("torch.")
        return self.result_type(
            matrices, described, self._fingerprint, self.options.normalize, self.options.tokens, dtype
        )

    def _new_groups(self, new_accumulator: Callable[[int, torch.device], Accumulator]) -> InputGroups:
        return InputGroups(self._text, new_accumulator, self.options.share_inputs)

    def _accumulator(self, storage: Storage, dim: int, device: torch.device) -> Accumulator:
        return Accumulator(dim, device, storage, self.options.buffer_rows)

    def _hooked(self, names: Sequence[str]) -> HookedModel:
        targets = {name: self._linears[name] for name in names}
        return HookedModel(self.model, targets, self._text, self._selector, self.options.normalize == "official")

    def _checkpoint(self, folder: Path, names: Sequence[str], groups: InputGroups) -> CaptureCheckpoint:
        return CaptureCheckpoint(folder, {"modules": list(names), **self._identity()}, groups, self._input_of)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have been written with, beside the modules."""
        return {
            "processes": self.processes.count,
            **self.options.identity(),
            "fingerprint": self._fingerprint,
        }

    def _dim(self, name: str) -> int:
        return linear_shape(self._linears[name])[1]

    def _input_of(self, name: str) -> tuple[torch.device, int]:
        """Where a layer that has not run will find its input, and the bytes of a number in it: a good guess."""
        weight = getattr(self._linears[name], "weight", None)
        itemsize = getattr(self.model, "dtype", torch.float32).itemsize
        if isinstance(weight, torch.Tensor) and not weight.is_meta:
            return weight.device, itemsize
        return input_device(self.model), itemsize

    def _check_finite(self, groups: InputGroups) -> None:
        """Empty the token buffers and name the first module, in the order of execution, whose C is not finite."""
        for group in groups.groups:
            group.accumulator.flush()
        for group in groups.groups:
            if not group.accumulator.is_finite():
                raise KoreError(
                    f"{group.modules[0]}: its {self.rows} holds NaN or infinity on this data, and it is the first such "
                    "module; check the model's weights and dtype (try bfloat16 or float32)"
                )
