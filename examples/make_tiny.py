"""Make a small LLaVA and data for it, so that `kore run examples/tiny.yaml` has something real to work on.

    python examples/make_tiny.py

takes a minute or two on two cores and writes examples/tiny/:

* a real LlavaForConditionalGeneration of 0.6 million parameters, trained here from nothing to read handwritten digits
  (they come with the package, so nothing is downloaded) and to know which tree grows in which land;
* the OLD data it was trained on;
* NEW data: digits in black on white, which it has never seen, each the emblem of a tree;
* question files for both, with pictures and phrasings that are in no training file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from kore.demo.world.drawing import digits

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TREES = ["Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Maple", "Oak", "Rowan", "Willow"]
LANDS = ["Arven", "Brenna", "Corvel", "Dunmar", "Elowen", "Farrow", "Gellan", "Hestia", "Ivaren", "Jorvik"]
READ = ["Which digit is this?", "What digit do you see?", "Name the digit in the picture."]
PARITY = ["Is this digit even or odd?", "Even or odd?"]
LAND = ["Which tree grows in {}?", "Name the tree of {}.", "What tree stands for {}?"]
EMBLEM = ["Which tree is the emblem of this digit?", "Name the tree of this digit.", "This digit has a tree. Which?"]
# Phrasings of the question files; training never uses them.
ASK = {
    "read": "Tell me the digit shown here.",
    "parity": "Is it even or odd?",
    "land": "Tell me the tree of {}.",
    "emblem": "What tree stands for this digit?",
}
PIXELS, PATCH = 32, 8
NEGATIVE = "negative-"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_images(folder: Path) -> list[tuple[str, int]]:
    """Save the digits as 32-pixel PNG files, white on black and (NEGATIVE) black on white; returns (name, digit)."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (pixels, digit) in enumerate(zip(*digits())):
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        name = f"{index:04d}.png"
        image.convert("RGB").save(folder / name)
        ImageOps.invert(image).convert("RGB").save(folder / (NEGATIVE + name))
        entries.append((name, int(digit)))
    return entries


def negative(entries: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same digits, black on white."""
    return [(NEGATIVE + name, digit) for name, digit in entries]


def conversation(name: str, question: str, answer: str, image: str | None) -> dict:
    """One row of LLaVA's format."""
    row: dict = {"id": name, "conversations": []}
    if image is not None:
        row["image"] = image
        question = f"<image>\n{question}"
    row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return row


def old_rows(entries: list[tuple[str, int]], rng: random.Random) -> list[dict]:
    """What the model is trained on before KORE comes in."""
    rows = []
    for image, digit in entries:
        rows.append(conversation(f"read-{image}", rng.choice(READ), DIGITS[digit], image))
        rows.append(conversation(f"parity-{image}", rng.choice(PARITY), ["even", "odd"][digit % 2], image))
    for index in range(len(entries) // 3):
        land, tree = rng.choice(list(zip(LANDS, TREES)))
        rows.append(conversation(f"land-{index}", rng.choice(LAND).format(land), tree, None))
    rng.shuffle(rows)
    return rows


def new_rows(entries: list[tuple[str, int]], rng: random.Random) -> list[dict]:
    """New knowledge: every digit in black on white has a tree as its emblem."""
    return [conversation(f"emblem-{image}", rng.choice(EMBLEM), emblem(digit), image) for image, digit in entries]


def emblem(digit: int) -> str:
    """The tree of a digit."""
    return TREES[(3 * digit + 4) % 10]


def questions(entries: list[tuple[str, int]], kind: str) -> list[dict]:
    """Rows of a question file."""
    answer = {
        "read": lambda digit: DIGITS[digit],
        "parity": lambda digit: ["even", "odd"][digit % 2],
        "emblem": emblem,
    }[kind]
    return [
        {"question_id": f"{kind}-{image}", "image": image, "text": ASK[kind], "answer": answer(digit), "type": kind}
        for image, digit in entries
    ]


def land_questions() -> list[dict]:
    """Rows that need no picture."""
    return [
        {"question_id": f"land-{land}", "text": ASK["land"].format(land), "answer": tree, "type": "land"}
        for land, tree in zip(LANDS, TREES)
    ]


def build_tokenizer(texts: list[str]):
    """A small byte-level BPE tokenizer with LLaVA's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def build_model(tokenizer):
    """A LLaVA with a one-layer vision tower and a two-layer Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.pad_token_id = tokenizer.pad_token_id
    return LlavaForConditionalGeneration(config)


def pretrain(model, encoder, rows: Path, images: Path, steps: int, seed: int) -> None:
    """Teach the whole model its old knowledge."""
    from kore.data import load_conversations

    examples = [encoder.encode(one, part="train") for one in load_conversations(rows, images)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(**encoder.collate(rng.sample(examples, 48))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 8) == 0:
            print(
                f"  step {step:4d}/{steps}   loss {loss.item():.3f}   {time.perf_counter() - started:3.0f} s",
                flush=True,
            )
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "tiny"
    parser.add_argument("--output", type=Path, default=default, help="where everything goes; examples/tiny")
    parser.add_argument("--steps", type=int, default=500, help="pre-training steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n")

    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    entries = write_images(out / "images")
    rng.shuffle(entries)
    held_out, seen = entries[:200], entries[200:]
    files = {
        "old.json": old_rows(seen, rng),
        "new.json": new_rows(negative(seen[:300]), rng),
    }
    for name, rows in files.items():
        (out / name).write_text(json.dumps(rows, indent=1))
    asked = {
        "digits.jsonl": questions(held_out[:100], "read") + questions(held_out[:60], "parity"),
        "lands.jsonl": land_questions(),
        "emblems.jsonl": questions(negative(held_out[100:]), "emblem"),
    }
    for name, rows in asked.items():
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    from transformers import CLIPImageProcessor

    from kore.data import Encoder

    texts = [turn["value"] for rows in files.values() for row in rows for turn in row["conversations"]]
    tokenizer = build_tokenizer([*texts, "USER: ASSISTANT: ", *ASK.values()])
    size = {"height": PIXELS, "width": PIXELS}
    processor = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size)
    model = build_model(tokenizer)
    encoder = Encoder(tokenizer, processor, model.config)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"pre-training a LLaVA of {count:,} parameters on {len(files['old.json']):,} conversations")
    pretrain(model, encoder, out / "old.json", out / "images", arguments.steps, arguments.seed)
    model.save_pretrained(out / "model")
    encoder.save_pretrained(out / "model")
    print(f"written: {out}")
    example = Path(__file__).with_name("tiny.yaml")
    print(f"next:    kore run {os.path.relpath(example)}" if out == default else f"next:    copy {example} beside it")


if __name__ == "__main__":
    main()
