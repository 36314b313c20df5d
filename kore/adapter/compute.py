"""The factors A of all layers: which process computes which, what is kept on disk, and how they come together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kore import __version__
from kore.adapter.config import KoreConfig
from kore.adapter.factors import device_of, is_sharded, read_weight, thin_init
from kore.adapter.parts import Part, Parts
from kore.adapter.rank import energy_share
from kore.covariance import CovarianceSet
from kore.distributed import Processes
from kore.errors import KoreError, ModelError
from kore.models import linear_shape, named_linears
from kore.nullspace import energy_space, geodesic, null_space

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn


@dataclass(frozen=True)
class Job:
    """The layers that share one input, d_in wide: one null space, and one thin SVD for each."""

    index: int
    members: tuple[str, ...]
    dim: int

    @property
    def cost(self) -> int:
        return self.dim**3


def compute_factors(
    model: nn.Module,
    names: Sequence[str],
    rank: int | None,
    cov: CovarianceSet | None,
    config: KoreConfig,
    fingerprint: Mapping[str, Any],
    *,
    progress: bool = True,
    distributed: dist.ProcessGroup | bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """A (r, d_in) float32 (float64 for a float64 layer) of every layer on the CPU, and what is known of its null space.

    Args:
        model: The base model.
        names: The layers.
        rank: r; None where ``config.rank`` is ``"energy:τ"``.
        cov: Covariances; None for random subspaces.
        config: What to make.
        fingerprint: Of the model.
        progress: Show a progress bar on an interactive terminal, of what this process computes.
        distributed: The processes that share the work; the same on all of them.
        checkpoint: A folder for finished parts.
    """
    linears = named_linears(model)
    jobs = _jobs(names, linears, cov, config)
    processes = Processes(distributed)
    plans = share_out(jobs, processes.count)
    sharded = any(is_sharded(linears[name]) for name in names)
    if processes.rank == 0:
        _warn_of_few_tokens(jobs, cov, config)
    identity = {"library version": __version__, "configuration": asdict(config), "model": dict(fingerprint)}
    parts, done = Parts(checkpoint), dict[int, Part]()
    # Gathering weights takes all processes, so with sharded ones they go on, or fail, job by job.
    together = "the initialisation"
    own = plans[processes.rank]
    with processes.fail_together(together), _Bar(own, progress and processes.rank == 0) as bar:
        for turn in range(max(map(len, plans)) if sharded else len(own)):
            job = own[turn] if turn < len(own) else None
            others = [plan[turn] for plan in plans if turn < len(plan)] if sharded else []
            weights = _gather(others, job, linears)
            with processes.fail_together(together) if sharded else contextlib.nullcontext():
                if job is None:
                    continue
                if cov is not None and checkpoint is not None:
                    identity = {**identity, "covariance": cov.digest(job.members[0])}
                found = parts.read(job.index, identity)
                done[job.index] = found or _compute(job, rank, cov, config, linears, weights)
                if found is None:
                    parts.write(job.index, identity, done[job.index])
                bar.advance(job, found is not None)
    return _collect(names, jobs, plans, done, linears, processes)


def share_out(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """The jobs of each of ``count`` processes: from the costliest on, each goes to the one with the least to do."""
    plans: list[list[Job]] = [[] for _ in range(count)]
    if count == 1:
        return [list(jobs)]
    loads = [0] * count
    for job in sorted(jobs, key=lambda job: (-job.cost, job.index)):
        least = loads.index(min(loads))
        plans[least].append(job)
        loads[least] += job.cost
    return plans


def _jobs(names: Sequence[str], linears: Mapping[str, Any], cov: CovarianceSet | None, config: KoreConfig) -> list[Job]:
    """The layers by shared input; every layer by itself where no covariance says which share."""
    members: dict[str, list[str]] = {}
    for name in names:
        known = cov is not None and (name in cov or config.constraint == "null_space")
        members.setdefault(cov.group(name).name if cov is not None and known else name, []).append(name)
    jobs = [Job(i, tuple(group), linear_shape(linears[group[0]])[1]) for i, group in enumerate(members.values())]
    for job in jobs:
        if cov is not None and job.members[0] in cov and cov.group(job.members[0]).dim != job.dim:
            raise ModelError(
                f"{job.members[0]}: the covariance is of d_in = {cov.group(job.members[0]).dim}, the layer is not; "
                "capture again"
            )
    return jobs


def _warn_of_few_tokens(jobs: Sequence[Job], cov: CovarianceSet | None, config: KoreConfig) -> None:
    if cov is None or config.constraint == "none":
        return
    short = [group for group in (cov.group(job.members[0]) for job in jobs) if group.tokens < group.dim]
    if short:
        warnings.warn(
            f"{short[0].name}: its covariance was captured on {short[0].tokens} tokens, fewer than d_in = "
            f"{short[0].dim} ({len(short)} such inputs): part of its null space is only what the data did not reach; "
            "capture more data",
            stacklevel=4,
        )


def _gather(jobs: Sequence[Job], own: Job | None, linears: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of ``own``, gathered by all processes, each of which asks for those of the same jobs."""
    weights = {}
    for job in jobs:
        for name in job.members:
            weight = read_weight(name, linears[name])
            if job is own:
                weights[name] = weight.cpu()
    return weights


def _compute(
    job: Job,
    rank: int | None,
    cov: CovarianceSet | None,
    config: KoreConfig,
    linears: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
) -> Part:
    basis, note = _basis(job, rank, cov, config, device_of(linears[job.members[0]]))
    factors = {}
    for name in job.members:
        weight = weights[name] if name in weights else read_weight(name, linears[name])
        factors[name] = thin_init(weight, basis, config.scale).to("cpu", _dtype(linears[name])).contiguous()
    return Part(factors, note)


def _dtype(linear: Any) -> torch.dtype:
    return torch.float64 if linear.weight.dtype == torch.float64 else torch.float32


def _basis(
    job: Job, rank: int | None, cov: CovarianceSet | None, config: KoreConfig, device: torch.device
) -> tuple[torch.Tensor, dict[str, Any]]:
    first = job.members[0]
    if config.constraint == "none":
        assert rank is not None
        return _random_basis(first, job.dim, rank, config.seed).to(device), {"method": "random", "rank": rank}
    assert cov is not None
    group, share = cov.group(first), energy_share(config.rank)
    C = cov[group.name].to(device)
    try:
        if share is not None:
            solved = energy_space(C, share)
        else:
            assert rank is not None
            solved = null_space(C, rank, config.solver, config.seed)
    except KoreError as error:
        raise KoreError(f"{group.name}: {error}") from None
    rank = solved.basis.shape[1]
    note = {
        "method": solved.method,
        "rank": rank,
        "tokens": group.tokens,
        "energy": float(solved.eigenvalues.sum()),
        "energy_ratio": solved.energy_ratio,
        "residual": solved.residual,
        "null_dim": solved.null_dim,
    }
    if config.strength == 1:
        return solved.basis, note
    start = _random_basis(first, job.dim, rank, config.seed).to(device)
    basis = geodesic(start, solved.basis, config.strength)
    energy = float((basis * (C.to(basis) @ basis)).sum())
    return basis, {**note, "strength": config.strength, "energy_at_strength": energy}


def _random_basis(name: str, d_in: int, rank: int, seed: int) -> torch.Tensor:
    """A uniformly random r-dimensional subspace, the same for the same layer and seed on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.linalg.qr(torch.randn(d_in, rank, dtype=torch.float64, generator=generator)).Q


def _collect(
    names: Sequence[str],
    jobs: Sequence[Job],
    plans: Sequence[Sequence[Job]],
    done: Mapping[int, Part],
    linears: Mapping[str, Any],
    processes: Processes,
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Hand every part from the process that made it to all, one factor at a time."""
    owners = {job.index: owner for owner, plan in enumerate(plans) for job in plan}
    told: dict[int, dict[str, Any]] = {}
    for some in processes.share({index: part.note for index, part in done.items()}):
        told.update(some)
    factors, notes = dict[str, torch.Tensor](), dict[str, dict[str, Any]]()
    for job in jobs:
        note = told[job.index]
        for name in job.members:
            mine = done[job.index].factors[name] if job.index in done else None
            shape = (note["rank"], job.dim)
            factors[name] = processes.hand_out(mine, owners[job.index], shape, _dtype(linears[name]))
            notes[name] = note
    return {name: factors[name] for name in names}, {name: notes[name] for name in names}


class _Bar:
    """A progress bar in units of cost, since the widest inputs take most of the time."""

    def __init__(self, jobs: Sequence[Job], shown: bool) -> None:
        self._layers, self._all, self._cost = 0, sum(len(job.members) for job in jobs), sum(job.cost for job in jobs)
        self._shown = shown

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(
            total=self._cost,
            disable=None if self._shown else True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
        )
        self._say()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, job: Job, found: bool) -> None:
        """Note a job as done; ``found`` on disk, it says nothing about the time the others take."""
        self._layers += len(job.members)
        if found and not self._bar.disable:
            self._bar.initial += job.cost
        self._bar.update(job.cost)
        self._say()

    def _say(self) -> None:
        self._bar.set_description_str(f"null spaces: {self._layers} of {self._all} layers")
