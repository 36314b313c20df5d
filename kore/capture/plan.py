"""How much memory a capture takes, said before it runs, and how it stays within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from kore.errors import KoreError
from kore.sizes import format_bytes

HOST = "cpu"


@dataclass(frozen=True)
class PlannedGroup:
    """One layer input of the plan.

    Attributes:
        modules: The layers that read it, in the order in which they run.
        dim: d_in.
        device: Where its rows are summed, as text.
        itemsize: Bytes of one number of a row.
    """

    modules: tuple[str, ...]
    dim: int
    device: str
    itemsize: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a capture keeps beside the model and its activations; ``print(plan)`` shows it.

    Attributes:
        groups: Every layer input, in the order in which they run.
        storage: ``"packed"``, ``"square"`` or ``"offload"``.
        windows: The passes over the data: the groups of each, by their index in ``groups``.
        dtype: Of the matrices.
        buffer_rows: Rows of each token buffer.
        budget: Bytes allowed on each device, or None.
        rows: What is summed: ``"input"`` or ``"output gradient"``.
    """

    groups: tuple[PlannedGroup, ...]
    storage: str
    windows: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    buffer_rows: int
    budget: int | None = None
    rows: str = "input"

    @property
    def width(self) -> str:
        """What the length of a row is called."""
        return "d_in" if self.rows == "input" else "d_out"

    def peak(self) -> dict[str, int]:
        """Bytes at the same time, by device. Rows of the first batch that exceed the buffers come on top when there
        is no budget: they wait for the matrices."""
        peak: Counter[str] = Counter()
        for window in self.windows:
            peak |= self._bytes([self.groups[index] for index in window])
        return dict(peak)

    def on_disk(self) -> int:
        """Bytes of the matrices that several passes leave on disk until the last one ends."""
        entries = sum(group.dim * (group.dim + 1) // 2 for group in self.groups)
        return entries * self.dtype.itemsize if len(self.windows) > 1 else 0

    def matrix_bytes(self, group: PlannedGroup) -> int:
        """Bytes of one matrix; a packed one is half of a pair."""
        square = group.dim * group.dim if self.storage == "square" else group.dim * (group.dim + 1) // 2
        return square * self.dtype.itemsize

    def buffer_bytes(self, group: PlannedGroup) -> int:
        """Bytes of one token buffer."""
        return self.buffer_rows * group.dim * group.itemsize

    def _bytes(self, groups: Sequence[PlannedGroup]) -> Counter[str]:
        need: Counter[str] = Counter()
        singles = Counter((group.dim, group.device) for group in groups)
        for (dim, device), count in singles.items():
            if self.storage == "square":
                need[device] += count * dim * dim * self.dtype.itemsize
                continue
            pair = (dim + 1) * dim * self.dtype.itemsize
            if self.storage == "offload" and device != HOST:  # torch gives out page-locked memory in powers of two
                need[HOST] += (count + 1) // 2 * (1 << (pair - 1).bit_length())
            else:
                need[device] += (count + 1) // 2 * pair
        for group in groups:
            need[group.device] += self.buffer_bytes(group)
        if self.storage == "offload":
            for device in {group.device for group in groups} - {HOST}:
                need[device] += max(g.dim for g in groups if g.device == device) ** 2 * self.dtype.itemsize
        return need

    def excess(self, groups: Sequence[PlannedGroup]) -> str | None:
        """The device on which ``groups`` at the same time exceed the budget, or None. Offloaded matrices are free."""
        if self.budget is None:
            return None
        limited = {group.device for group in groups} - ({HOST} if self.storage == "offload" else set())
        need = self._bytes(groups)
        return next((device for device in sorted(limited) if need[device] > self.budget), None)

    def __str__(self) -> str:
        modules = sum(len(group.modules) for group in self.groups)
        passes = f"{len(self.windows)} passes over the data" if len(self.windows) > 1 else "one pass"
        kind = str(self.dtype).removeprefix("torch.")
        title = f"covariance: {modules} layers read {len(self.groups)} inputs"
        title = title if self.rows == "input" else f"output gradients of {modules} layers"
        lines = [f"{title}; {self.storage} {kind} matrices, {passes}"]
        lines += _table(
            (f"{self.rows.split()[-1]}s", self.width, "matrices", "buffers", "device", "layers"),
            [
                (
                    str(len(alike)),
                    str(alike[0].dim),
                    format_bytes(len(alike) * self.matrix_bytes(alike[0])),
                    format_bytes(len(alike) * self.buffer_bytes(alike[0])),
                    alike[0].device,
                    " ".join(_leaf(module) for module in alike[0].modules),
                )
                for alike in self._kinds()
            ],
        )
        for device, need in sorted(self.peak().items()):
            notes = [] if self.budget is None else [f"allowed {format_bytes(self.budget)}"]
            if self.storage == "offload" and device == HOST:
                notes = ["the offloaded matrices"]
            if (free := free_bytes(device)) is not None:
                notes.append(f"free {format_bytes(free)}")
            lines.append(f"  {device}: {format_bytes(need)} at most" + (f" ({', '.join(notes)})" if notes else ""))
        if self.on_disk():
            lines.append(f"  disk: {format_bytes(self.on_disk())} for the results of finished passes")
        return "\n".join(lines)

    def _kinds(self) -> Iterable[list[PlannedGroup]]:
        kinds: dict[tuple[object, ...], list[PlannedGroup]] = {}
        for group in self.groups:
            key = (tuple(map(_leaf, group.modules)), group.dim, group.device, group.itemsize)
            kinds.setdefault(key, []).append(group)
        return kinds.values()


def make_plan(
    groups: Iterable[PlannedGroup],
    storage: str,
    dtype: torch.dtype,
    buffer_rows: int,
    budget: int | None,
    again: bool,
    rows: str = "input",
) -> MemoryPlan:
    """Choose storage and passes within ``budget`` bytes on each device on which rows are summed.

    ``storage="auto"`` is packed. What does not fit in one pass is split into passes over neighbouring layers, as few
    as fit, when the batches can be iterated ``again``; each costs the forward passes once more. When they cannot, the
    matrices of GPUs go to the host: that is slower than a few more passes, since each flush moves a matrix both ways.

    Raises:
        KoreError: Nothing fits.
    """
    groups = tuple(groups)
    everything = (tuple(range(len(groups))),)
    on_host = all(group.device == HOST for group in groups)
    kind = "packed" if storage == "auto" or (storage == "offload" and on_host) else storage
    plan = MemoryPlan(groups, kind, everything, dtype, buffer_rows, budget, rows)
    over = plan.excess(groups)
    if over is None:
        return plan
    if again:
        return replace(plan, windows=_windows(plan))
    if storage == "auto" and not on_host:
        offloaded = replace(plan, storage="offload")
        if offloaded.excess(groups) is None:
            return offloaded
    assert budget is not None
    raise KoreError(
        f"memory_budget: one pass needs {format_bytes(plan.peak()[over])} on {over}, {format_bytes(budget)} are "
        "allowed; several passes need batches that can be iterated again: give a list or a data loader, not an iterator"
    )


def _windows(plan: MemoryPlan) -> tuple[tuple[int, ...], ...]:
    windows: list[list[int]] = [[]]
    for index, group in enumerate(plan.groups):
        over = plan.excess([group])
        if over is not None:
            assert plan.budget is not None
            need, matrix = format_bytes(plan._bytes([group])[over]), f"a matrix of {plan.width} {group.dim}"
            raise KoreError(
                f"memory_budget: {group.modules[0]} alone needs {need} on {over} ({matrix} and a buffer of "
                f"{plan.buffer_rows} rows), {format_bytes(plan.budget)} are allowed; allow more or lower buffer_rows"
            )
        if plan.excess([plan.groups[i] for i in [*windows[-1], index]]) is not None:
            windows.append([])
        windows[-1].append(index)
    return tuple(map(tuple, windows))


def free_bytes(device: str) -> int | None:
    """Memory that is free on a device now, what torch holds in reserve included; None where it is not known."""
    if device == HOST:
        import psutil

        return int(psutil.virtual_memory().available)
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        return None
    reserve = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return int(torch.cuda.mem_get_info(where)[0] + reserve)


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    lines = []
    for row in [head, *body]:
        cells = [c.rjust(w) if i < 4 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
