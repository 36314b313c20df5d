"""The two model families of the miniature: small models of the real classes, each with tokenizer, chat template and
image processor, saved as any Hugging Face directory.

Besides building and saving, a family knows how to train without looking at a picture twice: :meth:`Family.look` gives
what the frozen vision tower hands to the projector, :meth:`Family.project` goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kore.demo.architecture import IMAGE_TOKEN, build_model, build_tokenizer, save_image_processor, train_bpe
from kore.demo.world.names import NAME_STARTS
from kore.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL import Image

INTERMEDIATE = 384
_QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Family:
    """A model family.

    Attributes:
        name: As commands name it.
        label: As tables show it.
        sizes: Width and height of its pictures, one is drawn for each.
        image_token: What one image token is called.
    """

    name: str
    label: str
    sizes: tuple[tuple[int, int], ...]
    image_token: str

    def tokenizer(self, texts: Iterable[str]) -> Any:
        """A tokenizer trained on texts, with the family's special tokens and chat template."""
        raise NotImplementedError

    def model(self, tokenizer: Any) -> Any:
        """A model with new weights, from torch's global generator."""
        raise NotImplementedError

    def save_processor(self, directory: Path) -> None:
        """Write the configuration of the image processor."""
        raise NotImplementedError

    def opening(self) -> str:
        """What a conversation begins with."""
        raise NotImplementedError

    def turn(self, question: str, answer: str, image_tokens: int) -> tuple[str, str, str]:
        """A round as the chat template writes it: what is asked, the answer with the token that ends it (the labels),
        what follows. ``image_tokens``: of a picture before the question."""
        raise NotImplementedError

    def look(self, model: Any, pictures: Sequence[Image.Image]) -> list[torch.Tensor]:
        """What the vision tower hands to the projector, (rows, width) for each picture, in the order of its tokens."""
        raise NotImplementedError

    def project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        """Rows of :meth:`look` of any number of pictures to image tokens, (tokens, width of the language model)."""
        raise NotImplementedError

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens a picture of this width and height becomes."""
        raise NotImplementedError

    def positions(self, ids: torch.Tensor, sizes: Sequence[tuple[int, int] | None]) -> torch.Tensor | None:
        """Position ids of right-padded conversations that hold at most one picture; None for the usual ones.

        Args:
            ids: (batch, tokens).
            sizes: Width and height of each row's picture.
        """
        return None

    def resized(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture in one of the family's sizes."""
        from PIL import Image

        size = self.sizes[rng.integers(len(self.sizes))]
        return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)


def projector(model: Any) -> Any:
    """The module between vision tower and language model."""
    from kore.models import projector_name

    return model.get_submodule(projector_name(model))


def vision_tower(model: Any) -> Any:
    """The vision tower; of Qwen2.5-VL with the merger in it."""
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] in ("vision_tower", "visual"))


def decoder(model: Any) -> Any:
    """The language model without its output head."""
    return next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))


class Llava(Family):
    """LLaVA: the demo's shipped CLIP tower, frozen; a new projector and a new Llama, 192 wide, 3 layers."""

    name, label, image_token = "llava", "LLaVA", IMAGE_TOKEN
    sizes = ((32, 32),)

    def tokenizer(self, texts: Iterable[str]) -> Any:
        return build_tokenizer(texts, NAME_STARTS)

    def model(self, tokenizer: Any) -> Any:
        return build_model(tokenizer, intermediate_size=INTERMEDIATE)

    def save_processor(self, directory: Path) -> None:
        save_image_processor(directory)

    def opening(self) -> str:
        return "<s>"

    def turn(self, question: str, answer: str, image_tokens: int) -> tuple[str, str, str]:
        image = IMAGE_TOKEN * image_tokens + "\n" if image_tokens else ""
        return f"USER: {image}{question} ASSISTANT:", f" {answer}</s>", ""

    def look(self, model: Any, pictures: Sequence[Image.Image]) -> list[torch.Tensor]:
        import torch

        from kore.demo.vision import pixels

        with torch.no_grad():
            return list(vision_tower(model)(pixel_values=pixels(list(pictures))).last_hidden_state[:, 1:])

    def project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        return projector(model)(rows)

    def image_tokens(self, size: tuple[int, int]) -> int:
        return 16


class QwenVL(Family):
    """Qwen2.5-VL: window attention in the tower, 12 pixels a token after the 2 x 2 merge, so that a picture has 9 to 16
    tokens after its size; M-RoPE, grouped queries, ChatML."""

    name, label, image_token = "qwen2.5-vl", "Qwen2.5-VL", "<|image_pad|>"
    sizes = ((36, 36), (36, 36), (36, 36), (48, 36), (36, 48), (48, 48))
    patch, merge = 6, 2

    def tokenizer(self, texts: Iterable[str]) -> Any:
        from transformers import PreTrainedTokenizerFast

        roles = ["user\n", "assistant\n", "system\n"] * 4
        fast = PreTrainedTokenizerFast(
            tokenizer_object=train_bpe([*texts, *roles], NAME_STARTS, _QWEN_SPECIAL),
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            additional_special_tokens=[token for token in _QWEN_SPECIAL if token != "<|endoftext|>"],
            model_max_length=1024,
            clean_up_tokenization_spaces=False,
        )
        fast.chat_template = _QWEN_TEMPLATE
        return fast

    def model(self, tokenizer: Any) -> Any:
        import transformers
        from packaging.version import Version
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        ids = tokenizer.get_vocab()
        text: dict[str, Any] = dict(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
            rope_theta=10000.0,
            use_sliding_window=False,
            tie_word_embeddings=False,
        )
        vision = dict(
            depth=2,
            hidden_size=96,
            intermediate_size=256,
            num_heads=4,
            out_hidden_size=192,
            patch_size=self.patch,
            spatial_merge_size=self.merge,
            temporal_patch_size=2,
            window_size=2 * self.patch * self.merge,
            fullatt_block_indexes=[1],
            in_channels=3,
            in_chans=3,
        )
        tokens = dict(
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        nested = Version(transformers.__version__) >= Version("4.52")
        given = {"text_config": text, "tie_word_embeddings": False} if nested else text
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **given, **tokens))

    def save_processor(self, directory: Path) -> None:
        from transformers import Qwen2VLImageProcessor

        logging.getLogger("transformers").setLevel(logging.ERROR)
        Qwen2VLImageProcessor(
            min_pixels=36 * 36,
            max_pixels=60 * 60,
            patch_size=self.patch,
            temporal_patch_size=2,
            merge_size=self.merge,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(directory)

    def opening(self) -> str:
        return ""

    def turn(self, question: str, answer: str, image_tokens: int) -> tuple[str, str, str]:
        image = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>" if image_tokens else ""
        return f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>", "\n"

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        side = self.patch * self.merge
        return size[1] // side, size[0] // side

    def image_tokens(self, size: tuple[int, int]) -> int:
        rows, columns = self.grid(size)
        return rows * columns

    def patches(self, picture: Image.Image) -> torch.Tensor:
        """What Qwen2VLImageProcessor gives for a picture of one of the sizes: (patches, 3 · 2 · patch²)."""
        import torch

        p, m = self.patch, self.merge
        rows, columns = self.grid(picture.size)
        values = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
        values = values.view(rows, m, p, columns, m, p, 3).permute(0, 3, 1, 4, 6, 2, 5)
        return values.unsqueeze(5).expand(*values.shape[:5], 2, p, p).reshape(rows * columns * m * m, -1)

    def look(self, model: Any, pictures: Sequence[Image.Image]) -> list[torch.Tensor]:
        import torch

        with torch.no_grad():
            return self.see(vision_tower(model), pictures)

    def see(self, tower: Any, pictures: Sequence[Image.Image]) -> list[torch.Tensor]:
        """:meth:`look` with gradients."""
        import torch

        grids = [self.grid(picture.size) for picture in pictures]
        thw = torch.tensor([[1, rows * self.merge, columns * self.merge] for rows, columns in grids])
        caught: list[torch.Tensor] = []

        def merged(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            # The tower then undoes its order by windows on these numbers instead of on the tokens.
            caught.append(inputs[0])
            return torch.arange(len(output))[:, None]

        handle = tower.merger.register_forward_hook(merged)
        try:
            result = tower(torch.cat([self.patches(picture) for picture in pictures]), grid_thw=thw)
        finally:
            handle.remove()
        order = getattr(result, "pooler_output", result)[:, 0]
        rows = caught[0].view(len(order), self.merge**2, -1)[order]
        counts = [height * width for height, width in grids]
        return [part.reshape(-1, part.shape[-1]) for part in rows.split(counts)]

    def project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        return projector(model)(rows)

    def positions(self, ids: torch.Tensor, sizes: Sequence[tuple[int, int] | None]) -> torch.Tensor | None:
        """M-RoPE (time, row, column): an image token has the place where the image starts plus its own in the grid;
        what follows goes on after the largest of them."""
        import torch

        found = torch.arange(ids.shape[1]).repeat(3, len(ids), 1)
        for row, size in enumerate(sizes):
            if size is None:
                continue
            height, width = self.grid(size)
            start = int((ids[row] == self._start).nonzero()[0]) + 1
            end, longest = start + height * width, max(height, width)
            found[0, row, start:end] = start
            found[1, row, start:end] = start + torch.arange(height).repeat_interleave(width)
            found[2, row, start:end] = start + torch.arange(width).repeat(height)
            found[:, row, end:] -= height * width - longest
        return found

    @property
    def _start(self) -> int:
        return _QWEN_SPECIAL.index("<|vision_start|>")


FAMILIES: dict[str, type[Family]] = {each.name: each for each in (Llava, QwenVL)}


@lru_cache(maxsize=4)
def family(name: str) -> Family:
    """The family with this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]()
