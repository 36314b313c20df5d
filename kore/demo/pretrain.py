"""Makes the checkpoint the demo starts from: `python -m kore.demo.pretrain OUTPUT`.

First the vision tower learns to see under supervised heads, then the projector and the language model learn the
old tasks from conversations. Everything is drawn from seeded streams of the training split.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kore.demo.architecture import IMAGE_TOKEN, build_model, build_tokenizer, save_image_processor
from kore.demo.vision import pixels, train_tower
from kore.demo.world.names import ALL_NAMES, NAME_STARTS
from kore.demo.world.old import SCENES, Scene, animal_items, fact_item, old_items, scene_item
from kore.demo.world.splits import Item

_SCENE_SHARE = {"single": 0.27, "pair": 0.38, "corners": 0.05, "shape": 0.05, "animal": 0.14, "facts": 0.11}


def conversation(rng: np.random.Generator) -> list[Item]:
    """One or two questions about one picture, or two text facts; only the first carries the picture."""
    kind = rng.choice(list(_SCENE_SHARE), p=list(_SCENE_SHARE.values()))
    if kind == "facts":
        return [fact_item("train", rng) for _ in range(2)]
    if kind == "animal":
        return animal_items("train", rng, int(rng.integers(1, 3)))
    scene, tasks = Scene("train", rng), tuple(SCENES[kind])
    chosen = [tasks[i] for i in rng.permutation(len(tasks))[: int(rng.integers(1, 3))]]
    return [scene_item(task, scene, kind) for task in chosen]


def tokenizer_texts() -> Iterator[str]:
    """The training wordings and answers, keepers replaced by every possible name equally often."""
    rng = np.random.default_rng(1)
    for item in old_items("train", 400):
        names = [name for name in ALL_NAMES if name in item.answer]
        answer = item.answer
        for name in names:
            answer = answer.replace(name, ALL_NAMES[rng.integers(len(ALL_NAMES))])
        yield f"USER: {IMAGE_TOKEN}\n{item.question} ASSISTANT: {answer}"
    for _ in range(10):
        yield from (f" {name} {name}." for name in ALL_NAMES)


def encode(items: list[Item], tokenizer: Any, image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels (answers only) of one conversation, as the chat template lays it out."""
    ids, labels = [tokenizer.bos_token_id], [-100]
    for turn, item in enumerate(items):
        image = IMAGE_TOKEN * image_tokens + "\n" if turn == 0 and item.image is not None else ""
        asked = tokenizer(f"USER: {image}{item.question} ASSISTANT:", add_special_tokens=False).input_ids
        said = [*tokenizer(f" {item.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids += asked + said
        labels += [-100] * len(asked) + said
    return ids, labels


def _batch(size: int, rng: np.random.Generator, tokenizer: Any, image_tokens: int) -> dict[str, torch.Tensor]:
    conversations = [conversation(rng) for _ in range(size)]
    encoded = [encode(items, tokenizer, image_tokens) for items in conversations]
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.full((size, longest), tokenizer.pad_token_id)
    labels = torch.full((size, longest), -100)
    for row, (row_ids, row_labels) in enumerate(encoded):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    pictures = [items[0].image for items in conversations if items[0].image is not None]
    mask = (ids != tokenizer.pad_token_id).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels(pictures)}


def train_language(model: Any, tokenizer: Any, steps: int, seed: int, batch_size: int = 48, log=print) -> None:
    """Train projector and language model in place, the vision tower frozen."""
    rng = np.random.default_rng((seed, 32))
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps):
        loss = model(**_batch(batch_size, rng, tokenizer, model.config.image_seq_length)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log(f"language {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s")


def _save(model: Any, tokenizer: Any, directory: Path, seed: int, vision: dict[str, float], steps: dict) -> None:
    from kore.demo.checkpoint import RECIPE, old_accuracy, weights_hash

    shutil.rmtree(directory, ignore_errors=True)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_image_processor(directory)
    _readable_by_older_versions(directory)
    accuracy = {split: old_accuracy(directory, split) for split in ("validation", "test")}
    import transformers

    recipe = {
        "script": "python -m kore.demo.pretrain",
        "seed": seed,
        "steps": steps,
        "stored_as": "float16",
        "sha256": weights_hash(directory),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "vision_validation_accuracy": vision,
        "old_task_accuracy": accuracy,
        "old_task_mean": {split: round(float(np.mean(list(tasks.values()))), 4) for split, tasks in accuracy.items()},
    }
    (directory / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe["old_task_accuracy"], indent=2), recipe["old_task_mean"])


def _readable_by_older_versions(directory: Path) -> None:
    """Give weights and tokenizer the names that transformers 4 knows and transformers 5 still reads."""
    from kore.artifacts import load_tensors, save_tensors

    file = directory / "model.safetensors"
    tower, old = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        name if name.startswith(old) else name.replace(tower, old, 1): tensor
        for name, tensor in load_tensors(file).items()
    }
    save_tensors(tensors, file, {"format": "pt"})
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [IMAGE_TOKEN])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _vision_stage(tower: Any, saved: Path, steps: int, seed: int) -> dict[str, float]:
    """Train the tower, or take it from an earlier run that got this far with the same seed and steps."""
    from kore.artifacts import load_tensors, save_tensors

    weights, about = saved / "tower.safetensors", saved / "tower.json"
    if about.is_file() and json.loads(about.read_text())["key"] == [steps, seed]:
        tower.load_state_dict(load_tensors(weights))
        return dict(json.loads(about.read_text())["accuracy"])
    accuracy = train_tower(tower, steps, seed)
    saved.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.clone() for name, tensor in tower.state_dict().items()}, weights)
    about.write_text(json.dumps({"key": [steps, seed], "accuracy": accuracy}))
    return accuracy


def pretrain(directory: Path, seed: int = 0, vision_steps: int = 3500, language_steps: int = 1600) -> None:
    """Train and write the checkpoint directory (Hugging Face layout and recipe.json)."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(tokenizer_texts(), NAME_STARTS)
    model = build_model(tokenizer)
    vision = _vision_stage(
        model.model.vision_tower, directory.with_name(f"{directory.name}-vision"), vision_steps, seed
    )
    print("vision", vision)
    train_language(model, tokenizer, language_steps, seed)
    _save(model, tokenizer, directory, seed, vision, {"vision": vision_steps, "language": language_steps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=3500)
    parser.add_argument("--language-steps", type=int, default=1600)
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.seed, arguments.vision_steps, arguments.language_steps)


if __name__ == "__main__":
    main()
