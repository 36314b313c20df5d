"""What each of the processes that initialise together does in ``test_adapter_processes``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from kore.adapter import KoreConfig, compute, get_kore_model, save_adapter
from kore.adapter.parts import Parts
from kore.covariance import CovarianceSet, load_covariance
from kore.errors import KoreError
from tests.batches import MODELS

CONFIGS = {
    "rank": KoreConfig(rank=5),
    "energy": KoreConfig(rank="energy:0.02"),
    "random": KoreConfig(rank=5, constraint="none"),
    "trained": KoreConfig(rank=5, train_a=True, strength=0.5),
}


def initialise(case: str, rank: int, folder: Path) -> None:
    model, cov, options = MODELS["llava"](), load_covariance(folder / "covariance"), {}
    if case == "sharded":
        from torch.distributed.fsdp import fully_shard

        for layer in [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]:
            fully_shard(layer)
        fully_shard(model)
        assert type(model.get_submodule(cov.modules[-1]).weight).__name__ == "DTensor"
    elif case in ("killed", "continued"):
        options["checkpoint"] = folder / "parts"
        write, solve = Parts.write, compute.null_space

        def write_and_die(self, *arguments):
            write(self, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        def count(*arguments):
            with open(folder / f"solved-{rank}", "a") as file:
                file.write(".")
            return solve(*arguments)

        Parts.write = write_and_die if case == "killed" else write
        compute.null_space = count
    elif case == "fails" and rank == 1:
        broken = {group.name: torch.full((group.dim, group.dim), float("nan")) for group in cov.groups}
        cov = CovarianceSet(broken, cov.groups, cov.fingerprint)
    elif case == "alone":
        options["distributed"] = False
    try:
        made = get_kore_model(model, cov, CONFIGS.get(case, CONFIGS["rank"]), progress=False, **options)
    except KoreError as error:
        (folder / f"error-{case}-{rank}").write_text(str(error))
        return
    if case == "sharded":
        factors = {name: tensor for name, tensor in made.state_dict().items() if ".lora_A." in name}
        torch.save(factors, folder / f"sharded-{rank}.pt")
    else:
        save_adapter(made, folder / f"{case}-{rank}")


def work(rank: int, count: int, store: Path, folder: Path, cases: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    for case in cases:
        initialise(case, rank, folder)
    dist.destroy_process_group()
