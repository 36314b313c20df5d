"""From conversations to model inputs, for LLaVA-1.5, Qwen2.5-VL and text-only models."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kore.data.template import ChatTemplate
from kore.data.tokens import IGNORE, Tokens, expand, tokenize, truncate
from kore.data.types import Conversation
from kore.data.vision import vision_for
from kore.errors import DataError, ModelError
from kore.models import load_image_processor

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Part = Literal["train", "prompt"]
_PADDED = ("input_ids", "attention_mask", "labels", "mm_token_type_ids")


class Encoder:
    """Turns conversations into the tensors of ``model(**batch)``.

    The chat template is rendered and tokenised once; image placeholders are then expanded in id space to as
    many tokens as each image has, which gives the ids of the model family's own processor without needing it.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        model_config: Any = None,
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """
        Args:
            tokenizer: A fast Hugging Face tokenizer.
            image_processor: The model's image processor; not needed for a text-only model.
            model_config: The model's configuration; None means a text-only model.
            chat_template: Jinja text in place of the tokenizer's own template. Where neither is there,
                ``kore.data.template.DEFAULT_TEMPLATE`` is used.
            max_length: Longest example in tokens, or None for no limit.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the tokenizer has no fast version; KORE needs one, for the places of tokens in the text")
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        self.chat_template = chat_template or own
        if self.chat_template is None:
            logger.warning("the model has no chat template; conversations are written as 'USER: ... ASSISTANT: ...'")
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.max_length = max_length
        self.vision = vision_for(model_config, image_processor)
        token = None if self.vision is None else tokenizer.convert_ids_to_tokens(self.vision.token_id)
        self._template = ChatTemplate(tokenizer, self.chat_template, token)
        self._token_types = self.vision is not None and _takes_token_types(model_config)
        self._warned = False

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, max_length: int | None = None, **kwargs: Any) -> Encoder:
        """Load tokenizer, chat template and image processor from a model directory or hub id.

        Raises:
            ModelError: One of them is missing or cannot be read.
        """
        import transformers

        text = os.fspath(path)
        if not Path(text).is_dir() and (Path(text).exists() or text.startswith((".", "/", "~"))):
            raise ModelError(f"{text}: no such model directory")
        try:
            config = transformers.AutoConfig.from_pretrained(text, **kwargs)
            tokenizer = transformers.AutoTokenizer.from_pretrained(text, **kwargs)
            image_processor = None
            if getattr(config, "vision_config", None) is not None:
                image_processor = load_image_processor(text, **kwargs)
            template = _processor_template(text, kwargs) if image_processor is not None else None
        except Exception as error:
            if isinstance(error, ModelError):
                raise
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{text}: tokenizer or image processor cannot be loaded ({first_line})") from error
        return cls(tokenizer, image_processor, config, chat_template=template, max_length=max_length)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer, chat template, image processor and model configuration into ``directory``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        own, self.tokenizer.chat_template = self.tokenizer.chat_template, self.chat_template
        try:
            self.tokenizer.save_pretrained(directory)
        finally:
            self.tokenizer.chat_template = own
        if self.model_config is not None:
            self.model_config.save_pretrained(directory)
        if self.vision is not None:
            self.vision.image_processor.save_pretrained(directory)
            if self.chat_template is not None:
                text = json.dumps({"chat_template": self.chat_template}, indent=2)
                (directory / "chat_template.json").write_text(text, encoding="utf-8")

    @property
    def pad_token_id(self) -> int:
        """The id that fills padding; masked out everywhere."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else eos if eos is not None else 0)

    def encode(self, conversation: Conversation, *, part: Part = "train") -> dict[str, torch.Tensor]:
        """Encode one conversation.

        Args:
            conversation: What to encode.
            part: ``"train"``: everything up to the last answer, with ``labels`` on the tokens of every answer and
                the token that ends its turn, -100 elsewhere. ``"prompt"``: everything before the last answer, with
                the generation prompt and without labels (calibration, generation).

        Returns:
            ``input_ids``, ``attention_mask`` and (train) ``labels``, (tokens,) int64; with images also
            ``pixel_values`` and, as the model takes them, ``image_grid_thw`` and ``mm_token_type_ids``.

        Raises:
            DataError: Images and placeholders do not match, an image cannot be decoded, or no answer token is
                left within ``max_length``; the message starts with the conversation's source.
        """
        import torch

        with _at(conversation):
            pixels, counts = self._pixels(conversation)
            tokens = self._tokens(conversation, part, counts)
            if tokens.images < len(counts):
                pixels, _ = self._pixels(conversation, tokens.images)
        if tokens.cut and not self._warned:
            self._warned = True
            logger.warning("%s: %d tokens cut to fit max_length %d", conversation.source, tokens.cut, self.max_length)
        ids = torch.tensor(tokens.ids, dtype=torch.int64)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        if part == "train":
            example["labels"] = torch.tensor(tokens.labels, dtype=torch.int64)
        if pixels and self._token_types and self.vision is not None:
            example["mm_token_type_ids"] = (ids == self.vision.token_id).long()
        return example

    def measure(self, conversation: Conversation, *, part: Part = "train") -> Tokens:
        """The ids and labels of :meth:`encode` without decoding an image (its header gives the token count)."""
        with _at(conversation):
            self._check_images(conversation)
            counts = [self.vision.count(path) for path in conversation.images] if self.vision is not None else []
            return self._tokens(conversation, part, counts)

    def _check_images(self, conversation: Conversation) -> None:
        if conversation.images and self.vision is None:
            raise DataError("the conversation has images but the model has no vision tower")

    def _pixels(
        self, conversation: Conversation, first: int | None = None
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        self._check_images(conversation)
        paths = conversation.images[:first]
        return self.vision.pixels(paths) if paths and self.vision is not None else ({}, [])

    def _tokens(self, conversation: Conversation, part: Part, counts: Sequence[int]) -> Tokens:
        if part not in ("train", "prompt"):
            raise DataError(f"part: expected 'train' or 'prompt', got {part!r}")
        train = part == "train"
        rendered = self._template.train(conversation) if train else self._template.prompt(conversation)
        ids, labels, tail = tokenize(self.tokenizer, rendered)
        image, start = (None, None) if self.vision is None else (self.vision.token_id, self.vision.start_token_id)
        whole = expand(ids, labels, counts, image)
        tokens = truncate(whole, self.max_length, counts, tail, image, start)
        if train and not tokens.answer_tokens:
            raise DataError(
                f"no answer token is left of {len(whole.ids)} tokens within max_length {self.max_length}; "
                "raise max_length or shorten the question"
            )
        return tokens

    def collate(
        self, examples: Sequence[dict[str, torch.Tensor]], padding_side: Literal["right", "left"] = "right"
    ) -> dict[str, torch.Tensor]:
        """Batch examples: pad to the longest, (batch, tokens), and concatenate the images in order."""
        import torch

        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE, "mm_token_type_ids": 0}
        batch = {}
        for key in _PADDED:
            if not any(key in example for example in examples):
                continue
            rows = torch.full((len(examples), longest), fill[key], dtype=torch.int64)
            for row, example in zip(rows, examples):
                if key in example:
                    length = len(example[key])
                    row[longest - length if padding_side == "left" else 0 :][:length] = example[key]
            batch[key] = rows
        for key in ("pixel_values", "image_grid_thw"):
            found = [example[key] for example in examples if key in example]
            if found:
                batch[key] = torch.cat(found)
        return batch

    def decode(self, ids: Any) -> str:
        """The text of token ids, special tokens left out, without surrounding space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _at:
    """Put a conversation's source in front of the message of a DataError."""

    def __init__(self, conversation: Conversation) -> None:
        self._source = conversation.source or f"conversation {conversation.id!r}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DataError):
            raise DataError(f"{self._source}: {error}") from error.__cause__


def _takes_token_types(config: Any) -> bool:
    """Whether the model's forward takes ``mm_token_type_ids`` (Qwen2.5-VL in transformers 5)."""
    import transformers

    try:
        model_class: Any = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    except KeyError:
        return False
    return "mm_token_type_ids" in inspect.signature(model_class.forward).parameters


def _processor_template(path: str, kwargs: dict[str, Any]) -> str | None:
    """The chat template saved with the model's processor, which a multimodal tokenizer may lack."""
    from transformers.utils import cached_file

    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **kwargs,
        )
        if file is None:
            continue
        text = Path(file).read_text(encoding="utf-8")
        if name.endswith(".jinja"):
            return text
        template = json.loads(text).get("chat_template")
        if isinstance(template, str):
            return template
    return None
