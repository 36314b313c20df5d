"""Padded batches for the tiny models, with several images in some samples."""

from __future__ import annotations

import torch

from tests.tiny import TOKEN, tiny_llama, tiny_llava, tiny_qwen_vl

MODELS = {"llama": tiny_llama, "llava": tiny_llava, "qwen_vl": tiny_qwen_vl}
KINDS = tuple(MODELS)


def make_batch(kind: str, seed: int = 0, length: int = 24) -> dict[str, torch.Tensor]:
    """Three samples with 1, 2 and 1 images and 0, 5 and 11 padding tokens; the padding is not all on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 300, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 5 :] = 0
    mask[2, :11] = 0
    starts = [(0, 2), (1, 1), (1, 9), (2, 13)]
    batch = {}
    if kind == "llava":
        for row, start in starts:
            ids[row, start : start + 4] = TOKEN["<image>"]
        batch["pixel_values"] = torch.randn(len(starts), 3, 28, 28, generator=generator)
    elif kind == "qwen_vl":
        image = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
        for row, start in starts:
            ids[row, start : start + 3] = torch.tensor([TOKEN[text] for text in image])
        batch["pixel_values"] = torch.randn(4 * len(starts), 3 * 2 * 14 * 14, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * len(starts))
    ids[mask == 0] = TOKEN["<pad>"]
    return {"input_ids": ids, "attention_mask": mask, **batch, "labels": ids.clone()}


def make_batches(kind: str, count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [make_batch(kind, seed) for seed in range(count)]


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the kept tokens."""
    with torch.no_grad():
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return output.logits[batch["attention_mask"].bool()]
