"""Evaluation of a model of a family that KORE does not train, by its own processor, with a plain PEFT adapter."""

from __future__ import annotations

import json

import pytest
import torch

from kore.cli.main import main
from kore.data import Question
from kore.errors import DataError, ModelError
from kore.evaluation import ProcessorPrompts, evaluate, load_prompts, load_result
from kore.models import load_model
from tests.tiny import TOKEN, save_tiny, tiny_conversations, tiny_llava, tiny_tokenizer

TEMPLATE = """{% for message in messages %}{{ message.role.upper() + ': ' }}{% for part in message.content %}\
{% if part.type == 'image' %}<image>
{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small LLaVA-NeXT, a plain LoRA of it, pictures, and questions."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    folder = tmp_path_factory.mktemp("family")
    plain = tiny_llava().config
    sizes = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=TOKEN["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=sizes,
        pad_token_id=TOKEN["<pad>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    model.save_pretrained(folder / "model")
    size = {"height": 28, "width": 28}
    images = LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=sizes)
    LlavaNextProcessor(
        images,
        tiny_tokenizer("llava"),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "model")
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")
    tiny_conversations(folder, 4)
    rows = [
        {"question_id": f"q{i}", "text": "What is it?" * (1 + i % 3), "answer": "red", "type": f"t{i % 2}"}
        | ({"image": f"{i % 4}.png"} if i != 2 else {})
        for i in range(5)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_answers_are_those_of_the_model_with_its_processor(folder):
    from PIL import Image

    model, prompts = load_model(folder / "model", device="cpu"), load_prompts(folder / "model")
    assert isinstance(prompts, ProcessorPrompts)
    asked = Question("q", folder / "images" / "1.png", "What is it?", "red", "t")
    found = evaluate(model, prompts, [asked], max_new_tokens=4, progress=False).answers[0]
    inputs = prompts.processor(
        text="USER: <image>\nWhat is it? ASSISTANT:", images=Image.open(asked.image), return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert found.prediction == prompts.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_the_command_asks_it_with_an_adapter_in_batches_and_one_by_one(folder, tmp_path):
    said = {}
    for name, words in {
        "one": ["--batch-size", "1"],
        "batch": ["--batch-size", "4"],
        "adapter": ["-a", f"{folder}/adapter"],
    }.items():
        ask = ["eval", "-m", f"{folder}/model", "-q", f"{folder}/q.jsonl", "--image-root", f"{folder}/images"]
        ask += ["-o", f"{tmp_path}/{name}", "--max-new-tokens", "5", "--device", "cpu", *words]
        assert main(ask) == 0
        said[name] = [answer.prediction for answer in load_result(tmp_path / name / "new" / "q").answers]
        assert (tmp_path / name / "report.html").is_file()
    assert said["one"] == said["batch"] != said["adapter"] and len(set(said["one"])) > 1


def test_what_it_cannot_ask_is_named(folder, tmp_path):
    model, prompts = load_model(folder / "model", device="cpu"), load_prompts(folder / "model")
    with pytest.raises(DataError, match=r"q.jsonl:1: the prompt has \d{3,} tokens and the answer up to 32"):
        evaluate(model, prompts, [Question("q", None, "word " * 600, "red", "t", "q.jsonl:1")], progress=False)
    (tmp_path / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"q.jsonl:2: image .*cut\.png cannot be decoded"):
        evaluate(model, prompts, [Question("q", tmp_path / "cut.png", "Who?", "red", "t", "q.jsonl:2")], progress=False)
    prompts.processor.chat_template = prompts.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        ProcessorPrompts(prompts.processor)


def test_known_families_keep_their_encoder_and_broken_ones_their_error(tmp_path):
    from kore.data import Encoder

    save_tiny("llava", tmp_path / "llava")
    assert isinstance(load_prompts(tmp_path / "llava"), Encoder)
    (tmp_path / "llava" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer or image processor cannot be loaded"):
        load_prompts(tmp_path / "llava")
