"""The demo's small model: a real LlavaForConditionalGeneration with its tokenizer and image processor."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
_SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + ' ' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def train_bpe(
    texts: Iterable[str], name_starts: Iterable[str], special: Iterable[str], vocabulary: int = 1000
) -> Tokenizer:
    """Byte-level BPE trained on the texts. A name is cut after its first syllable before any merge, so that a new
    name is made of two known tokens, as a rare name is for a large model's tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    name_start = Regex(f" ?(?:{'|'.join(name_starts)})(?=[a-z])")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(name_start, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(texts: Iterable[str], name_starts: Iterable[str]) -> PreTrainedTokenizerFast:
    """:func:`train_bpe` with the special tokens and the chat template of the demo's LLaVA."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, name_starts, _SPECIAL),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    tokenizer: PreTrainedTokenizerFast, patch_size: int = 8, intermediate_size: int = 512
) -> LlavaForConditionalGeneration:
    """CLIP tower 96 wide, 2 layers, 32-pixel pictures; Llama 192 wide, 3 layers; two-layer projector."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=(32 // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.pad_token_id = tokenizer.pad_token_id
    return LlavaForConditionalGeneration(config)


def save_image_processor(directory: Path) -> None:
    """The tower's CLIPImageProcessor configuration: 32 pixels, mean and std 0.5."""
    from transformers import CLIPImageProcessor

    half = [0.5, 0.5, 0.5]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=half, image_std=half
    ).save_pretrained(directory)
