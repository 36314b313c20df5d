"""Random models of the real LLaVA class, in any size, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of a LLaVA-1.5: ``width`` is d, ``inner`` the inner width of its MLPs; the vision tower is a CLIP."""

    layers: int
    width: int
    inner: int
    heads: int
    vision_layers: int
    vision_width: int
    vision_inner: int
    vision_heads: int
    image: int = 336
    patch: int = 14
    vocabulary: int = 32_064

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2


LLAVA_7B = LlavaShape(32, 4096, 11008, 32, 24, 1024, 4096, 16)
SMALL = LlavaShape(4, 1024, 2752, 16, 2, 64, 128, 2, vocabulary=2048)
TINY = LlavaShape(2, 64, 176, 4, 2, 32, 64, 2, image=56, vocabulary=128)


def random_llava(shape: LlavaShape, device: torch.device, dtype: torch.dtype) -> Any:
    """A LlavaForConditionalGeneration with random weights, made where it is to run."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
        projection_dim=shape.vision_width,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=shape.vocabulary - 1,
        image_seq_length=shape.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_batches(
    shape: LlavaShape, count: int, batch_size: int, text_tokens: int, dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """Batches on the CPU for ``model(**batch)``: one image a sample in the middle of random text, nothing padded."""
    generator = torch.Generator().manual_seed(0)
    side, batches = shape.image, []
    for _ in range(count):
        words = torch.randint(3, shape.vocabulary - 1, (batch_size, text_tokens), generator=generator)
        picture = torch.full((batch_size, shape.image_tokens), shape.vocabulary - 1)
        ids = torch.cat([words[:, : text_tokens // 2], picture, words[:, text_tokens // 2 :]], dim=1)
        pixels = torch.randn(batch_size, 3, side, side, generator=generator).to(dtype)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return batches
