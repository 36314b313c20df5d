"""How many tokens an image becomes, and its pixels, for the supported model families."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kore.errors import DataError, ModelError
from kore.fetch import image_size, open_image

if TYPE_CHECKING:
    import torch

# Tokens that the vision tower adds to its patches (the class token), by vision model type.
_EXTRA_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


class Vision(Protocol):
    """The image side of one model family."""

    image_processor: Any
    token_id: int
    start_token_id: int | None

    def count(self, path: Path) -> int:
        """Number of image tokens of the image, from its header."""

    def pixels(self, paths: Sequence[Path]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The vision inputs of these images and how many tokens each becomes."""


def vision_for(config: Any, image_processor: Any) -> Vision | None:
    """The image side of the model with this configuration, or None for a text-only model.

    Raises:
        ModelError: The family is not supported, or its image processor is missing.
    """
    if getattr(config, "vision_config", None) is None:
        return None
    kinds: dict[str, Callable[[Any, Any], Vision]] = {
        "llava": LlavaVision,
        "qwen2_vl": QwenVision,
        "qwen2_5_vl": QwenVision,
    }
    if config.model_type not in kinds:
        raise ModelError(f"model type {config.model_type!r}: expected a text-only model or one of {', '.join(kinds)}")
    if image_processor is None:
        raise ModelError(f"a {config.model_type} model needs its image processor (preprocessor_config.json)")
    return kinds[config.model_type](config, image_processor)


def _image_token(config: Any) -> int:
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)


def _processed(image_processor: Any, paths: Sequence[Path]) -> Any:
    try:
        return image_processor(images=[open_image(path) for path in paths], return_tensors="pt")
    except DataError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"the image processor refuses {', '.join(map(str, paths))} ({error})") from None


class LlavaVision:
    """LLaVA-1.5: every image becomes the same number of tokens,
    (height / patch) · (width / patch) + extra tokens of the tower, less one where the model drops the first."""

    start_token_id: int | None = None

    def __init__(self, config: Any, image_processor: Any) -> None:
        tower = config.vision_config
        if tower.model_type not in _EXTRA_TOKENS:
            raise ModelError(f"vision tower {tower.model_type!r}: expected one of {', '.join(_EXTRA_TOKENS)}")
        self.image_processor = image_processor
        self.token_id = _image_token(config)
        self._patch = tower.patch_size
        self._extra = _EXTRA_TOKENS[tower.model_type] - (config.vision_feature_select_strategy == "default")

    def _tokens(self, pixel_values: torch.Tensor) -> int:
        height, width = pixel_values.shape[-2:]
        return (height // self._patch) * (width // self._patch) + self._extra

    @functools.cached_property
    def _count(self) -> int:
        from PIL import Image

        images = [Image.new("RGB", size) for size in ((64, 48), (48, 64))]
        processed = [self.image_processor(images=[image], return_tensors="pt") for image in images]
        counts = {self._tokens(batch["pixel_values"]) for batch in processed}
        if len(counts) > 1:
            raise ModelError("the image processor keeps the aspect ratio; LLaVA-1.5 needs images of one size")
        return counts.pop()

    def count(self, path: Path) -> int:
        return self._count

    def pixels(self, paths: Sequence[Path]) -> tuple[dict[str, torch.Tensor], list[int]]:
        pixel_values = _processed(self.image_processor, paths)["pixel_values"]
        return {"pixel_values": pixel_values}, [self._tokens(pixel_values)] * len(paths)


class QwenVision:
    """Qwen2-VL and Qwen2.5-VL: an image becomes t · h · w / merge² tokens, (t, h, w) its grid of patches."""

    def __init__(self, config: Any, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.token_id = _image_token(config)
        self.start_token_id: int | None = config.vision_start_token_id
        self._merge = image_processor.merge_size

    def count(self, path: Path) -> int:
        processor, (height, width) = self.image_processor, image_size(path)
        factor = processor.patch_size * self._merge
        try:
            height, width = sys.modules[type(processor).__module__].smart_resize(  # type: ignore[attr-defined]
                height,
                width,
                factor=factor,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
        except ValueError as error:
            raise DataError(f"image {path}: {error}") from None
        return (height // factor) * (width // factor)

    def pixels(self, paths: Sequence[Path]) -> tuple[dict[str, torch.Tensor], list[int]]:
        batch = _processed(self.image_processor, paths)
        grid = batch["image_grid_thw"]
        counts = (grid.prod(dim=-1) // self._merge**2).tolist()
        return {"pixel_values": batch["pixel_values"], "image_grid_thw": grid}, counts
