"""``kore reproduce --scale paper``: every row of the paper's tables as a configuration of `kore run`.

The settings are those of ``recipe: paper`` and of the examples of this repository. They have not been run here: they
need large GPUs, the models and the data. A row whose files are missing is written and said, and not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kore.artifacts import atomic_write
from kore.errors import ConfigError, KoreError
from kore.reproduce.studies import (
    AUGMENTED,
    BALANCED,
    GENERAL,
    KORE,
    LLAVA,
    PLAIN,
    ROWS,
    SPECIFIC,
    TWO_SIDED,
    Row,
    plain,
)
from kore.reproduce.tasks import Say

LORA_RANK = "match-lora-128"
"""128 where A is trained; for MoELoRA, what its routers leave of that budget."""
RANKS = (64, 128, 256)
FULL_RATE = 2e-5
_THREE = (plain("lora"), plain("replay"), KORE, BALANCED, TWO_SIDED)
_GROUPS = ("general", "doc-chart-screen", "math", "ocr")


@dataclass(frozen=True)
class RealModel:
    """A model of the paper.

    Attributes:
        name: Of folders.
        path: A directory or a hub id.
        kore_rank: Of KORE's adapter.
        batch_size: Per process.
        rows: Names of its rows; None for all.
    """

    name: str
    path: str
    kore_rank: int | str
    batch_size: int
    rows: tuple[str, ...] | None = None


MODELS = (
    RealModel("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "match-lora-128", 6),
    RealModel("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "match-lora-128", 4, _THREE),
    RealModel("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", 274, 4, _THREE),
)
NEW: Mapping[str, str] = {
    AUGMENTED: "KORE-74K/KORE-74K-training_data.json",
    PLAIN: "EVOKE/evoke_injection_data.json",
    **{kind: f"EVOKE/general-{kind}/llava.json" for kind in ("text-aware", *GENERAL)},
}
"""Where each kind of new data lies in the data folder; `kore augment` makes the general ones."""


def paper_rows() -> Iterator[tuple[RealModel, Row]]:
    """Every row of every model, with the paper's ranks and its four general augmentations."""
    from dataclasses import replace

    known = [row for row in ROWS if row.family == LLAVA and "rank" not in row.tables[:1]]
    base = next(row for row in known if row.name == KORE)
    known += [replace(base, name=f"kore-rank-{r}", label=f"KORE, rank {r}", rank=r) for r in RANKS]
    free = next(row for row in known if row.name == f"general-{GENERAL[0]}")
    known.append(replace(free, name="general-text-aware", label="text-aware", data="text-aware"))
    for model in MODELS:
        yield from ((model, row) for row in known if model.rows is None or row.name in model.rows)


def configuration(model: RealModel, row: Row, data: Path, output: Path) -> dict[str, Any]:
    """What `kore run` is given for a row; paths are absolute.

    Args:
        model: Of the paper.
        row: Of its tables.
        data: The folder of the data.
        output: Of the run.
    """
    data = data.absolute()
    kore = row.method in ("kore", "random-a")
    rank = row.rank if isinstance(row.rank, int) else model.kore_rank if kore and not row.train_a else LORA_RANK
    options = {key: value for key, value in row.options.items() if key not in ("samples", "previous_steps")}
    images = "KORE-74K/imgs" if row.data == AUGMENTED else "EVOKE/images"
    files = [data / "onevision" / f"{name}.json" for name in _GROUPS]
    old: dict[str, Any] = {"files": [str(file) for file in files], "image_root": str(data / "onevision" / "images")}
    if row.groups:
        benchmark = SPECIFIC[row.groups[0]]
        old = {"files": [str(data / "benchmarks" / f"{benchmark}.json")],
               "image_root": str(data / "benchmarks" / "images")}  # fmt: skip
    elif row.merge == "balanced" and kore:
        old["balance"] = True
    train: dict[str, Any] = {"batch_size": model.batch_size, "gradient_checkpointing": True, "save_steps": 500}
    if row.method == "full":
        train["learning_rate"] = FULL_RATE
    adapter: dict[str, Any] = {"method": row.method, **({"rank": rank} if row.rank is not None else {})}
    if options:
        adapter["options"] = options
    if row.train_a:
        adapter["train_a"] = True
    return {
        "output_dir": str(output.absolute()),
        "seed": 233,
        "recipe": "paper",
        "model": {"path": model.path, "dtype": "bfloat16"},
        "old": old,
        "capture": {"batch_size": 4},
        "adapter": adapter,
        "new": {"files": str(data / NEW[row.data]), "image_root": str(data / images)},
        "train": train,
        **({"protection": {"strength": "auto", "components": 256}} if row.two_sided else {}),
        "eval": {
            "new": [
                {
                    "name": "evoke",
                    "file": str(data / "EVOKE" / "evoke_evaluation_data.jsonl"),
                    "image_root": str(data / "EVOKE" / "images"),
                }
            ],
            "max_new_tokens": 64,
            "batch_size": 16,
        },
    }


def missing_files(values: Mapping[str, Any]) -> list[str]:
    """The files and folders of a configuration that are not there, and the model where it is a folder that is not."""
    wanted = [*values["old"]["files"], values["old"]["image_root"], values["new"]["files"], values["new"]["image_root"]]
    wanted += [path for one in values["eval"]["new"] for path in (one["file"], one["image_root"])]
    model = values["model"]["path"]
    if model.startswith((".", "/")):
        wanted.append(model)
    return [path for path in dict.fromkeys(wanted) if not Path(path).exists()]


def run_paper(
    output_dir: str | os.PathLike[str],
    data: Path,
    say: Say = print,
    rows: Sequence[str] | None = None,
    check: bool = False,
    stage: Callable[..., Any] | None = None,
) -> dict[str, list[str]]:
    """Write the configuration of every row, and run those whose files are there.

    Args:
        output_dir: Configurations go to ``configurations/``, runs to ``runs/``.
        data: The folder of the data, laid out as :data:`NEW` and the examples have it.
        say: Is told a line for each row.
        rows: "model/row"; None for all.
        check: Write and check only.
        stage: Is told of the stages of a run, as `kore run` does.

    Returns:
        What is missing, by row; nothing for a row that has been run.

    Raises:
        ConfigError: There is no such row.
        KoreError: Some runs failed.
    """
    from kore.pipeline.loading import load_config
    from kore.pipeline.run import run_pipeline

    home = Path(output_dir)
    known = {f"{model.name}/{row.name}": (model, row) for model, row in paper_rows()}
    for name in rows or ():
        if name not in known:
            raise ConfigError(f"rows: expected names out of {', '.join(known)}, got {name!r}")
    found: dict[str, list[str]] = {}
    failed: list[str] = []
    for name in rows or known:
        model, row = known[name]
        values = configuration(model, row, data, home / "runs" / name)
        file = home / "configurations" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        head = f"# {row.label}, {model.name}. Made by kore reproduce --scale paper; not run in its repository.\n"
        atomic_write(file, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        load_config(file, check_paths=False)
        found[name] = missing_files(values)
        if found[name] or check:
            what = f"missing {', '.join(found[name])}" if found[name] else "ready"
            say(f"{name}: {what}")
            continue
        try:
            report = run_pipeline(load_config(file), stage or (lambda *_: None), progress=False)
            say(f"{name}: report {report}")
        except KoreError as error:
            failed.append(name)
            say(f"{name}: failed, {error}")
    ready = sum(not each for each in found.values())
    say(
        f"{len(found)} configurations in {home / 'configurations'}; files are there for {ready}. K.R of the paper: "
        "kore retention on each trained adapter."
    )
    if failed:
        raise KoreError(f"{len(failed)} of {len(found)} runs failed: {', '.join(failed)}")
    return found
