"""Pre-trains the models of the miniature: one directory for each family and world.

The vision towers are shared: LLaVA's worlds take the tower that `kore demo` ships, Qwen2.5-VL's take one that is
trained here once. Projector and language model begin from new weights in every world and learn its old knowledge.
Everything is drawn from seeded streams of the training split. A directory appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kore.artifacts import atomic_write, load_tensors, read_json, save_tensors
from kore.demo.world.names import ALL_NAMES
from kore.demo.world.splits import Item
from kore.reproduce.families import Family, QwenVL, decoder, family, projector, vision_tower
from kore.reproduce.optimizer import Training
from kore.reproduce.world.lore import Lore, lore
from kore.reproduce.world.old import conversations

ABOUT = "pretrained.json"
_IGNORE = -100
Log = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and on what a model is pre-trained.

    Attributes:
        steps: Of projector and language model.
        batch_size: Conversations in a step.
        pictures: Pictures and text-only talks that are drawn.
        rounds: Different conversations about each.
        rate: Peak learning rate of AdamW; Muon's is ten times that.
        align_steps: Of the projector alone, before.
        tower_steps: Of the Qwen2.5-VL tower.
        tower_pictures: It is trained on.
    """

    steps: int = 700
    batch_size: int = 48
    pictures: int = 9000
    rounds: int = 3
    rate: float = 2.5e-3
    align_steps: int = 300
    tower_steps: int = 1000
    tower_pictures: int = 16_000


FULL = Schedule()
QUICK = Schedule(steps=350, pictures=6000, tower_steps=600, tower_pictures=10_000)


@dataclass
class Example:
    """One conversation, ready for the language model; ``weights`` of an answer's tokens add up to 1."""

    ids: list[int]
    labels: list[int]
    weights: list[float]
    picture: int | None


def tokenizer_texts(known: Lore, pictures: int = 1500) -> Iterator[str]:
    """Training wordings and answers of a world, people replaced by every possible name equally often.

    Args:
        known: The world.
        pictures: That conversations are drawn about.
    """
    rng = np.random.default_rng((known.world, 63))
    named = set(ALL_NAMES)
    for talks in conversations(known, rng, pictures, 1):
        for item in talks[0]:
            words = [ALL_NAMES[rng.integers(len(ALL_NAMES))] if w.strip(".?") in named else w
                     for w in f"{item.question} {item.answer}".split(" ")]  # fmt: skip
            yield f"USER: {' '.join(words)} ASSISTANT:"
    for _ in range(10):
        yield from (f" {name} {name}." for name in ALL_NAMES)


class Writer:
    """Conversations as token ids, as the chat template lays them out."""

    def __init__(self, kind: Family, tokenizer: Any) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        self._ids = lru_cache(maxsize=100_000)(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))

    def encode(self, items: Sequence[Item], picture: int | None, image_tokens: int) -> Example:
        """A conversation; rounds before a question (``history``) are rounds like the others."""
        ids = list(self._ids(self.kind.opening())) if self.kind.opening() else []
        labels, weights = [_IGNORE] * len(ids), [0.0] * len(ids)
        rounds = [turn for item in items for turn in (*item.history, (item.question, item.answer))]
        for number, (question, answer) in enumerate(rounds):
            asked, said, after = self.kind.turn(question, answer, image_tokens if number == 0 else 0)
            for text, learned in ((asked, False), (said, True), (after, False)):
                part = self._ids(text) if text else ()
                ids += part
                labels += part if learned else [_IGNORE] * len(part)
                weights += [1 / len(part) if learned else 0.0] * len(part)
        return Example(ids, labels, weights, picture)


@dataclass
class Pool:
    """Examples, what the vision tower sees in their pictures, and the pictures' sizes."""

    examples: list[Example]
    rows: list[torch.Tensor]
    sizes: list[tuple[int, int]]


def draw_pool(model: Any, kind: Family, tokenizer: Any, known: Lore, schedule: Schedule, rng: Any) -> Pool:
    """Draw the training conversations of a world and look at each picture once."""
    writer, pool = Writer(kind, tokenizer), Pool([], [], [])
    waiting: list[Any] = []

    def look() -> None:
        pool.rows.extend(kind.look(model, waiting))
        waiting.clear()

    for talks in conversations(known, rng, schedule.pictures, schedule.rounds):
        image = talks[0][0].image
        number, tokens = None, 0
        if image is not None:
            image = kind.resized(image, rng)
            number, tokens = len(pool.sizes), kind.image_tokens(image.size)
            pool.sizes.append(image.size)
            waiting.append(image)
        pool.examples += [writer.encode(items, number, tokens) for items in talks]
        if len(waiting) == 256:
            look()
    look() if waiting else None
    return pool


@torch.no_grad()
def whiten(model: Any, kind: Family, rows: Sequence[torch.Tensor], floor: float = 1e-3) -> None:
    """Let the projector's first layer begin as a whitening of what it is given, in place.

    A tower shows some things, such as colour, only in directions of small variance, which take a language model
    thousands of steps to find. W = Q (C + floor · tr C / d)^-1/2 and b = -W m, with m and C the mean and covariance of
    the layer's inputs over ``rows`` and Q random with orthonormal columns; a token then has about unit variance.
    """
    module = projector(model)
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Linear))
    seen: list[torch.Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        kind.project(model, torch.cat(list(rows)))
    finally:
        handle.remove()
    values = torch.cat(seen).flatten(0, -2).double()
    mean, cov = values.mean(0), torch.cov(values.T)
    size = len(cov)
    energy, basis = torch.linalg.eigh(cov + floor * cov.trace() / size * torch.eye(size))
    turn = torch.linalg.qr(torch.randn(first.out_features, size, dtype=torch.float64))[0]
    weight = turn @ basis @ torch.diag(energy.rsqrt()) @ basis.T
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ mean)


def batches(pool: Pool, schedule: Schedule, rng: np.random.Generator) -> Iterator[list[Example]]:
    """Batches of examples of similar length, every example once an epoch."""
    size, group = schedule.batch_size, 16
    while True:
        order = rng.permutation(len(pool.examples))
        for start in range(0, len(order) - size * group + 1, size * group):
            near = sorted(order[start : start + size * group], key=lambda i: len(pool.examples[i].ids))
            for number in rng.permutation(group):
                yield [pool.examples[i] for i in near[number * size : (number + 1) * size]]


def loss_of(model: Any, kind: Family, pool: Pool, batch: Sequence[Example], image_id: int) -> torch.Tensor:
    """Weighted mean of the cross-entropy over the answer tokens of a batch. One word weighs as much as a sentence:
    most words of a sentence are known before the picture is seen.

    Padding is on the right, so a causal model needs no mask; logits are made for answers only.
    """
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)
    labels, weights = torch.full_like(ids, _IGNORE), torch.zeros(ids.shape)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
        weights[row, : len(example.weights)] = torch.tensor(example.weights)
    language = decoder(model)
    embedded = language.embed_tokens(ids)
    shown = [example.picture for example in batch if example.picture is not None]
    if shown:
        tokens = kind.project(model, torch.cat([pool.rows[picture] for picture in shown]))
        embedded = embedded.masked_scatter((ids == image_id)[..., None], tokens.to(embedded.dtype))
    sizes = [None if example.picture is None else pool.sizes[example.picture] for example in batch]
    positions = kind.positions(ids, sizes)
    hidden = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != _IGNORE
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted])
    losses = nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="none")
    weight = weights[:, 1:][wanted]
    return (losses * weight).sum() / weight.sum()


def train_language(
    model: Any, kind: Family, pool: Pool, schedule: Schedule, rng: np.random.Generator, image_id: int, log: Log
) -> None:
    """Train projector and language model in place, the vision tower frozen."""
    model.train().requires_grad_(True)
    vision_tower(model).requires_grad_(False)
    projector(model).requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = Training(parameters, decoder(model).layers, schedule.rate, schedule.steps)
    clock, drawn = Clock(), batches(pool, schedule, rng)
    for step in range(schedule.steps):
        loss = loss_of(model, kind, pool, next(drawn), image_id)
        training.step(loss)
        if step % 50 == 0 or step + 1 == schedule.steps:
            log(f"language {step + 1:5d}/{schedule.steps}  loss {loss.item():.4f}  {clock}")


class Clock:
    """Seconds since it was made, and how many of them this process worked."""

    def __init__(self) -> None:
        self._wall, self._core = time.perf_counter(), time.process_time()

    def as_dict(self) -> dict[str, float]:
        """``seconds`` and ``core_seconds``."""
        return {"seconds": time.perf_counter() - self._wall, "core_seconds": time.process_time() - self._core}

    def __str__(self) -> str:
        now = self.as_dict()
        return f"{now['seconds']:.0f} s ({now['core_seconds']:.0f} s of work)"


def prepare_tower(name: str, directory: Path, schedule: Schedule = FULL, log: Log = print) -> dict[str, Any]:
    """Train the vision tower that the worlds of a family share, where it is not there; LLaVA's is shipped.

    Args:
        name: Of the family.
        directory: For ``tower.safetensors`` and, written last, ``tower.json``.

    Returns:
        What ``tower.json`` holds: the schedule, seconds, and the accuracy of every head on validation digits.
    """
    kind = family(name)
    if not isinstance(kind, QwenVL):
        return {}
    from kore.reproduce.vision import train_tower

    key = {"steps": schedule.tower_steps, "pictures": schedule.tower_pictures}
    weights, about = directory / "tower.safetensors", directory / "tower.json"
    if not about.is_file() or read_json(about)["key"] != key:
        directory.mkdir(parents=True, exist_ok=True)
        clock = Clock()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        tower = vision_tower(kind.model(kind.tokenizer(["What is this?"])))
        accuracy = train_tower(tower, _shipped_tower(), kind, schedule.tower_steps, schedule.tower_pictures, log=log)
        state = {name: tensor.clone() for name, tensor in tower.state_dict().items() if not name.startswith("merger.")}
        save_tensors(state, weights)
        atomic_write(about, json.dumps({"key": key, **clock.as_dict(), "accuracy": accuracy}, indent=1))
    return dict(read_json(about))


def _shipped_tower() -> Any:
    import kore
    from kore.demo.checkpoint import checked_checkpoint

    return vision_tower(kore.load_model(checked_checkpoint()[0], dtype="float32", device="cpu"))


def pretrain(
    name: str, world: int, directory: Path, towers: Path, schedule: Schedule = FULL, log: Log = print
) -> dict[str, Any]:
    """Train one model and write it as a Hugging Face directory with :data:`ABOUT` in it.

    A directory that is complete and of the same schedule is left as it is.

    Args:
        name: Of the family.
        world: Its number; also the seed.
        directory: Of the model.
        towers: A folder for what the worlds of a family share.
        schedule: How long.
        log: Is told a line now and then.

    Returns:
        What :data:`ABOUT` holds: the schedule, seconds, what the projector shows, parameters, and the sha256
        of the weights.
    """
    key = {"family": name, "world": world, **asdict(schedule)}
    done = directory / ABOUT
    if done.is_file():
        about: dict[str, Any] = read_json(done)
        if about["key"] == key:
            return about
    kind, known, shared = family(name), lore(world), towers / name
    from kore.reproduce.vision import align

    prepare_tower(name, shared, schedule, log)
    clock = Clock()
    torch.set_num_threads(1)
    torch.manual_seed(world)
    tokenizer = kind.tokenizer(tokenizer_texts(known, min(1500, schedule.pictures)))
    model = kind.model(tokenizer)
    state = load_tensors(shared / "tower.safetensors") if isinstance(kind, QwenVL) else _shipped_tower().state_dict()
    vision_tower(model).load_state_dict(state, strict=not isinstance(kind, QwenVL))
    rng = np.random.default_rng((world, 64))
    pool = draw_pool(model, kind, tokenizer, known, schedule, rng)
    log(f"{len(pool.examples)} conversations about {len(pool.sizes)} pictures  {clock}")
    whiten(model, kind, pool.rows[:1500])
    seeing = align(
        model, kind, schedule.align_steps, np.random.default_rng((world, 67)), pool=min(4000, schedule.pictures)
    )
    log(f"projector aligned  {clock}")
    train_language(model, kind, pool, schedule, rng, tokenizer.get_vocab()[kind.image_token], log)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.eval().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    kind.save_processor(partial)
    about = {
        "key": key,
        **clock.as_dict(),
        "projector_accuracy": seeing,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256((partial / "model.safetensors").read_bytes()).hexdigest(),
    }
    atomic_write(partial / ABOUT, json.dumps(about, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return about
