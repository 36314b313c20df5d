"""Small random models of the real Hugging Face classes, with tokenizers, image processors and data on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCABULARY = 320
IMAGE_SIZE = 28
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>", "<|im_start|>", "<|im_end|>"]
TOKEN = {text: index for index, text in enumerate(SPECIAL)}

LLAVA_TEMPLATE = """{% for message in messages %}{% if message.role == 'system' %}{{ message.content[0].text + ' ' }}\
{% else %}{{ message.role.upper() + ': ' }}{% for part in message.content %}{% if part.type == 'image' %}<image>
{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

QWEN_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SENTENCES = [
    "What is the colour of the square in this picture?",
    "The picture shows a small square on a plain ground.",
    "Who founded the city of Arven, and in which year?",
    "Arven was founded by Mira Solt in the year 1312.",
    "Describe the image in one sentence.",
]


TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=TOKEN["<s>"],
    eos_token_id=TOKEN["</s>"],
    pad_token_id=TOKEN["<pad>"],
    tie_word_embeddings=False,
)


def _text_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(**{**TEXT, **changes})


def tiny_llama(seed: int = 0, **changes):
    """A random LlamaForCausalLM: d=48, f=80, 2 layers."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(_text_config(**changes)).eval()


def tiny_llava(seed: int = 0, **changes):
    """A random LlavaForConditionalGeneration: 28-pixel images as 4 tokens, text model as tiny_llama."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=14,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(**changes),
        image_token_index=TOKEN["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=TOKEN["<pad>"],
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).eval()


def tiny_qwen_vl(seed: int = 0):
    """A random Qwen2_5_VLForConditionalGeneration: 28-pixel images as 1 token after the 2x2 merge."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    mrope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]}
    text = {**TEXT, "eos_token_id": TOKEN["<|im_end|>"], "rope_scaling": mrope, "rope_theta": 10000.0}
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=56,
        fullatt_block_indexes=[1],
        in_channels=3,
        in_chans=3,
    )
    tokens = dict(
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<|vision_start|>"],
        vision_end_token_id=TOKEN["<|vision_end|>"],
    )
    import transformers
    from packaging.version import Version

    nested = Version(transformers.__version__) >= Version("4.52")
    text_arguments = {"text_config": text, "tie_word_embeddings": False} if nested else text
    config = Qwen2_5_VLConfig(vision_config=vision, **text_arguments, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_tokenizer(kind: str):
    """A real fast tokenizer (byte-level BPE trained on SENTENCES) with the chat template of ``kind``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>" if kind == "qwen_vl" else "</s>",
        pad_token="<pad>",
        padding_side="right",
    )
    fast.chat_template = LLAVA_TEMPLATE if kind == "llava" else QWEN_TEMPLATE
    return fast


def save_tiny(kind: str, directory: str | Path, seed: int = 0) -> Path:
    """Save the tiny model of ``kind`` ("llama", "llava" or "qwen_vl") as a user has one on disk."""
    directory = Path(directory)
    model = {"llama": tiny_llama, "llava": tiny_llava, "qwen_vl": tiny_qwen_vl}[kind](seed)
    model.save_pretrained(directory)
    tiny_tokenizer(kind).save_pretrained(directory)
    if kind == "llava":
        preprocessor = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": IMAGE_SIZE},
            "do_center_crop": True,
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        }
        (directory / "processor_config.json").write_text(json.dumps(processor))
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    elif kind == "qwen_vl":
        preprocessor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 28 * 28,
            "max_pixels": 56 * 56,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def tiny_conversations(directory: str | Path, n: int = 8, text_only: bool = False) -> Path:
    """Write ``n`` LLaVA-format conversations with their images below ``directory``; returns the JSON file."""
    from PIL import Image, ImageDraw

    directory = Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    colours = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
    rows = []
    for index in range(n):
        colour = colours[index % len(colours)]
        question, answer = "What is the colour of the square?", f"The square is {colour}."
        row = {"id": f"row-{index}", "conversations": []}
        if not text_only:
            image = Image.new("RGB", (40 + index, 36), "gray")
            corner = 4 + index % 8
            ImageDraw.Draw(image).rectangle([corner, corner, corner + 16, corner + 16], fill=colour)
            image.save(directory / "images" / f"{index}.png")
            row["image"] = f"{index}.png"
            question = f"<image>\n{question}"
        turns = [("human", question), ("gpt", answer)]
        if index % 3 == 2:
            turns += [("human", "Describe the image in one sentence."), ("gpt", SENTENCES[1])]
        row["conversations"] = [{"from": role, "value": text} for role, text in turns]
        rows.append(row)
    file = directory / "conversations.json"
    file.write_text(json.dumps(rows, indent=1))
    return file
