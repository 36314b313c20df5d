from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor
from transformers.utils import is_torchvision_available

from kore.data import Conversation, Encoder, Message, Question, prompt_batches
from kore.errors import DataError, ModelError
from kore.models import load_image_processor, load_model
from tests.tiny import save_tiny, tiny_tokenizer

KINDS = ("llava", "qwen_vl", "llama")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("images")
    paths = []
    for index, size in enumerate(((40, 36), (90, 30), (30, 62))):
        Image.effect_noise(size, 60).convert("RGB").save(root / f"{index}.png")
        paths.append(root / f"{index}.png")
    return tuple(paths)


def talk(*texts: str, images: tuple[Path, ...] = (), system: str | None = None) -> Conversation:
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Conversation("c", images, tuple(messages), "data.json:5")


def labelled(encoder: Encoder, example: dict[str, torch.Tensor]) -> list[str]:
    """The runs of labelled tokens, as text."""
    runs, open_run = [], []
    for token, label in zip(example["input_ids"].tolist(), example["labels"].tolist()):
        assert label in (token, -100)
        if label != -100:
            open_run.append(token)
        elif open_run:
            runs.append(encoder.tokenizer.decode(open_run))
            open_run = []
    return [*runs, *([encoder.tokenizer.decode(open_run)] if open_run else [])]


def test_exactly_the_answers_and_their_end_of_turn_carry_loss(models: dict, images: tuple) -> None:
    conversation = talk(
        "<image>\nWhat is it?", "A square.", "Who?", "Mira Solt. ", images=images[:1], system="Be kind."
    )
    llava, qwen = (Encoder.from_pretrained(models[kind]) for kind in ("llava", "qwen_vl"))
    assert labelled(llava, llava.encode(conversation)) == [" A square.</s>", " Mira Solt.</s>"]
    assert labelled(qwen, qwen.encode(conversation)) == ["A square.<|im_end|>", "Mira Solt.<|im_end|>"]
    text = llava.tokenizer.decode(llava.encode(conversation)["input_ids"])
    assert text == (
        "Be kind. USER: <image><image><image><image>\nWhat is it? ASSISTANT: A square.</s> "
        "USER: Who? ASSISTANT: Mira Solt.</s>"
    )
    llama = Encoder.from_pretrained(models["llama"])
    assert labelled(llama, llama.encode(talk("Q", "A <|im_end|>"[:2]))) == ["A<|im_end|>"]


def test_answer_that_repeats_the_question_is_found_in_its_own_turn(models: dict) -> None:
    encoder = Encoder.from_pretrained(models["llama"])
    example = encoder.encode(talk("red", "red", "red", "red"))
    assert labelled(encoder, example) == ["red<|im_end|>"] * 2
    first = example["labels"].ne(-100).nonzero()[0].item()
    assert encoder.tokenizer.decode(example["input_ids"][:first]).endswith("<|im_start|>assistant\n")


def test_labels_are_what_generation_from_the_prompt_must_produce(models: dict, images: tuple) -> None:
    for kind in ("llava", "qwen_vl"):
        encoder = Encoder.from_pretrained(models[kind])
        earlier = ("One.", "And?") if kind == "qwen_vl" else ()
        conversation = talk("<image>Q?", *earlier, "Two words.", images=images[:1])
        prompt, train = encoder.encode(conversation, part="prompt"), encoder.encode(conversation)
        length = len(prompt["input_ids"])
        assert "labels" not in prompt
        torch.testing.assert_close(train["input_ids"][:length], prompt["input_ids"])
        assert train["labels"][length] == train["input_ids"][length]
        assert train["labels"][length - 1] == -100
        assert encoder.decode(train["input_ids"][length:]) == "Two words."


def processor_messages(conversation: Conversation) -> list[dict]:
    messages = []
    for message in conversation.messages:
        parts: list[dict] = []
        for index, piece in enumerate(message.text.split("<image>")):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
        messages.append({"role": message.role, "content": parts})
    return messages


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_equal_to_the_real_llava_processor(models: dict, images: tuple, strategy: str) -> None:
    encoder = Encoder.from_pretrained(models["llava"])
    encoder.model_config.vision_feature_select_strategy = strategy
    encoder = Encoder(encoder.tokenizer, encoder.vision.image_processor, encoder.model_config)
    processor = LlavaProcessor(
        image_processor=encoder.vision.image_processor,
        tokenizer=tiny_tokenizer("llava"),
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=encoder.chat_template,
    )
    for conversation in (
        talk("<image>\nWhat is it?", images=images[:1]),
        talk("<image>\n<image>\nSame?", "No.", "Why?", images=images[:2], system="Be brief."),
    ):
        text = processor.apply_chat_template(processor_messages(conversation), add_generation_prompt=True)
        pictures = [Image.open(path).convert("RGB") for path in conversation.images]
        expected = processor(images=pictures, text=text, return_tensors="pt")
        example = encoder.encode(conversation, part="prompt")
        torch.testing.assert_close(example["input_ids"], expected["input_ids"][0])
        torch.testing.assert_close(example["pixel_values"], expected["pixel_values"], rtol=0, atol=0)


@pytest.mark.skipif(not is_torchvision_available(), reason="Qwen2_5_VLProcessor needs torchvision")
def test_equal_to_the_real_qwen_processor(models: dict, images: tuple) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    encoder = Encoder.from_pretrained(models["qwen_vl"])
    processor = Qwen2_5_VLProcessor(
        image_processor=load_image_processor(models["qwen_vl"]),
        tokenizer=tiny_tokenizer("qwen_vl"),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=encoder.chat_template,
    )
    for conversation in (
        talk("<image>What is it?", images=images[1:2]),
        talk("<image><image>Same?", "No.", "<image>Why?", images=images, system="Be brief."),
    ):
        text = processor.apply_chat_template(processor_messages(conversation), add_generation_prompt=True)
        pictures = [Image.open(path).convert("RGB") for path in conversation.images]
        expected = processor(images=pictures, text=[text], return_tensors="pt")
        example = encoder.encode(conversation, part="prompt")
        torch.testing.assert_close(example["input_ids"], expected["input_ids"][0])
        for key in ("pixel_values", "image_grid_thw"):
            torch.testing.assert_close(example[key], expected[key], rtol=0, atol=0)
        if "mm_token_type_ids" in expected:
            torch.testing.assert_close(example["mm_token_type_ids"], expected["mm_token_type_ids"][0].long())


@pytest.mark.parametrize("kind", ["llava", "qwen_vl"])
def test_mixed_batch_gives_each_row_its_own_logits(models: dict, images: tuple, kind: str) -> None:
    encoder, model = Encoder.from_pretrained(models[kind]), load_model(models[kind])
    rows = [
        talk("<image>What is it?", "A square.", images=images[1:2]),
        talk("Who founded Arven?", "Mira."),
        talk("<image>\nSame as\n<image>", "No, it is not.", "Why?", "So.", images=images[:2]),
    ]
    examples = [encoder.encode(row) for row in rows]
    single = [model(**encoder.collate([example])).logits[0] for example in examples]
    for side in ("right", "left"):
        batch = encoder.collate(examples, padding_side=side)
        logits = model(**batch).logits
        for row, mask, expected in zip(logits, batch["attention_mask"].bool(), single):
            torch.testing.assert_close(row[mask], expected, rtol=1e-4, atol=1e-5)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == encoder.pad_token_id).all()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("kind", ["llava", "qwen_vl"])
def test_truncation_never_splits_an_image(models: dict, images: tuple, kind: str) -> None:
    conversation = talk("Look: <image> then <image> then <image>, what?", "A.", images=images)
    whole = Encoder.from_pretrained(models[kind])
    token = whole.vision.token_id
    counts = [whole.vision.count(path) for path in images]
    length = len(whole.encode(conversation, part="prompt")["input_ids"])
    prefix = whole.encode(talk("Look:"), part="prompt")["input_ids"]
    tail = next(i for i in range(1, length) if not torch.equal(prefix[-i:], _prompt(whole, conversation)[-i:])) - 1
    for limit in range(tail + 1, length + 1):
        encoder = Encoder.from_pretrained(models[kind], max_length=limit) if limit % 7 == 0 else whole
        encoder.max_length = limit
        example = encoder.encode(conversation, part="prompt")
        ids = example["input_ids"].tolist()
        assert len(ids) <= limit
        assert ids.count(token) in [sum(counts[:kept]) for kept in range(4)]
        assert ids[-1] == _last(encoder)
        if kind == "llava":
            kept = len(example.get("pixel_values", ()))
        else:
            kept = len(example.get("image_grid_thw", ()))
            assert ids.count(encoder.vision.start_token_id) == kept
        assert ids.count(token) == sum(counts[:kept])
        assert encoder.measure(conversation, part="prompt").ids == ids
        encoder.max_length = None


def _prompt(encoder: Encoder, conversation: Conversation) -> torch.Tensor:
    return encoder.encode(conversation, part="prompt")["input_ids"]


def _last(encoder: Encoder) -> int:
    limit, encoder.max_length = encoder.max_length, None
    last = _prompt(encoder, talk("Q"))[-1].item()
    encoder.max_length = limit
    return last


def test_truncation_says_what_it_cut_and_refuses_an_example_without_answer(models: dict, caplog) -> None:
    encoder = Encoder.from_pretrained(models["llama"], max_length=40)
    long_answer = talk("Q", "The picture shows a small square on a plain ground. " * 3)
    with caplog.at_level(logging.WARNING, logger="kore"):
        example = encoder.encode(long_answer)
        encoder.encode(long_answer)
    whole = len(Encoder.from_pretrained(models["llama"]).encode(long_answer)["input_ids"])
    assert len(example["input_ids"]) == 40
    assert [r.getMessage() for r in caplog.records] == [f"data.json:5: {whole - 40} tokens cut to fit max_length 40"]
    with pytest.raises(DataError, match=r"data.json:5: no answer token is left .* max_length 40"):
        encoder.encode(talk("Who founded the city of Arven, and in which year? " * 3, "Mira."))


def test_errors_name_the_source(models: dict, images: tuple, tmp_path: Path) -> None:
    llama, qwen = (Encoder.from_pretrained(models[kind]) for kind in ("llama", "qwen_vl"))
    with pytest.raises(DataError, match=r"data.json:5: .*no vision tower"):
        llama.encode(talk("<image>Q", "A", images=images[:1]))
    with pytest.raises(DataError, match=r"data.json:5: the rendered text has 2 .* 1 image"):
        qwen.encode(talk("<image>Q <|image_pad|>", "A", images=images[:1]))
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:200])
    with pytest.raises(DataError, match=r"data.json:5: image .*broken.png cannot be decoded"):
        qwen.encode(talk("<image>Q", "A", images=(broken,)))
    thin = tmp_path / "thin.png"
    Image.new("RGB", (300, 1)).save(thin)
    for read in (qwen.encode, qwen.measure):
        with pytest.raises(DataError, match=r"data.json:5: .*(aspect ratio|larger than factor)"):
            read(talk("<image>Q", "A", images=(thin,)))
    plain = tiny_tokenizer("llama")
    from tokenizers import normalizers

    plain._tokenizer.normalizer = normalizers.Replace("€", "")
    with pytest.raises(DataError, match=r"data.json:5: the tokenizer has no tokens for an answer"):
        Encoder(plain).encode(talk("Q", "€"))
    with pytest.raises(ModelError, match="no such model directory"):
        Encoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ModelError, match="tokenizer or image processor cannot be loaded"):
        Encoder.from_pretrained(tmp_path)


def test_templates_of_plain_text_and_none(models: dict, caplog) -> None:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    encoder = Encoder(tokenizer)
    example = encoder.encode(talk("Q", " A \n"))
    assert tokenizer.decode(example["input_ids"]) == "[user] Q\n[assistant] A</s>"
    assert labelled(encoder, example) == ["[assistant] A</s>"]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}\n{% endfor %}"
    encoder = Encoder(tokenizer)
    assert labelled(encoder, encoder.encode(talk("Q", "A"))) == ["[assistant] A </s>"]
    tokenizer.chat_template = None
    plain = Encoder(tokenizer)
    assert "no chat template" in caplog.text
    assert tokenizer.decode(_prompt(plain, talk("Q", "A"))) == "USER: Q ASSISTANT:"
    assert labelled(plain, plain.encode(talk("Q", "A", system="S"))) == [" A</s>"]
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(DataError, match=r"data.json:5: the chat template refuses the conversation .*no system turn"):
        Encoder(tokenizer).encode(talk("Q", "A"))


def test_templates_with_the_features_of_published_models(images: tuple, models: dict) -> None:
    """Images rendered first, generation blocks, a default system turn, a namespace that counts."""
    llava, qwen = (Encoder.from_pretrained(models[kind]) for kind in ("llava", "qwen_vl"))
    llava = Encoder(
        llava.tokenizer,
        llava.vision.image_processor,
        llava.model_config,
        chat_template=(
            "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
            "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
            "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{% if m['role'] == 'assistant' %}"
            "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% else %}{{ c['text'] + ' ' }}{% endif %}"
            "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        ),
    )
    example = llava.encode(talk("What is\n<image>", "A dot.", images=images[:1]))
    text = llava.tokenizer.decode(example["input_ids"]).replace("<image>" * 4, "<image>")
    assert text == "USER: <image>\nWhat is ASSISTANT: A dot.</s>"
    assert labelled(llava, example) == [" A dot.</s>"]
    qwen = Encoder(
        qwen.tokenizer,
        qwen.vision.image_processor,
        qwen.model_config,
        chat_template=(
            "{% set count = namespace(value=0) %}{% for m in messages %}"
            "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
            "<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
            "{% for c in m['content'] %}{% if c['type'] == 'image' %}{% set count.value = count.value + 1 %}"
            "Picture {{ count.value }}: <|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )
    example = qwen.encode(talk("<image><image>Same?", "No.", "Why?", "So.", images=images[:2]))
    assert qwen.tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\nBe good.<|im_end|>\n")
    assert "Picture 2: " in qwen.tokenizer.decode(example["input_ids"])
    assert labelled(qwen, example) == ["No.<|im_end|>", "So.<|im_end|>"]


def test_bos_of_the_template_is_not_doubled(models: dict) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("llama")
    tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    without = Encoder(tokenizer).encode(talk("Q", "A"), part="prompt")["input_ids"].tolist()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encoder = Encoder(tokenizer)
    assert encoder.encode(talk("Q", "A"), part="prompt")["input_ids"].tolist() == without
    assert without.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in without


def test_save_and_load_give_the_same_encoding(models: dict, images: tuple, tmp_path: Path) -> None:
    for kind in ("llava", "qwen_vl"):
        encoder = Encoder.from_pretrained(models[kind])
        encoder.save_pretrained(tmp_path / kind)
        again = Encoder.from_pretrained(tmp_path / kind)
        conversation = talk("<image>Q", "A", images=images[:1])
        first, second = encoder.encode(conversation), again.encode(conversation)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_template_of_the_processor_wins_over_the_tokenizer(models: dict, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(models["llava"], tmp_path / "m")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = tmp_path / "m" / name
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
        else:
            settings = json.loads(file.read_text())
            settings.pop("chat_template", None)
            file.write_text(json.dumps(settings))
    (tmp_path / "m" / "chat_template.json").write_text(
        json.dumps({"chat_template": "{{ messages[0].content[0].text }}!"})
    )
    encoder = Encoder.from_pretrained(tmp_path / "m")
    assert encoder.tokenizer.decode(_prompt(encoder, talk("Hello"))) == "Hello!"


def test_prompt_batches_are_reiterable(models: dict, images: tuple) -> None:
    encoder = Encoder.from_pretrained(models["llava"])
    conversations = [talk("<image>Q" + " word" * i, "A", images=images[:1]) for i in range(5)]
    batches = prompt_batches(conversations, encoder, 2)
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert [len(batch["input_ids"]) for batch in first] == [2, 2, 1]
    assert all("labels" not in batch for batch in first)
    for a, b in zip(first, second):
        torch.testing.assert_close(a["input_ids"], b["input_ids"])
    question = Question("1", images[0], "Q", "A", "t")
    torch.testing.assert_close(
        encoder.encode(question.conversation(), part="prompt")["input_ids"],
        encoder.encode(conversations[0], part="prompt")["input_ids"],
    )


@pytest.mark.parametrize("style", ["normalizer", "metaspace"])
def test_answers_are_found_with_tokenizers_that_mark_words_with_a_space_sign(style: str) -> None:
    """Both ways in which Llama tokenizers come: spaces turned into a sign before or while words are split."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import SENTENCES

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if style == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace()
    alphabet = sorted(
        {character for text in (*SENTENCES, "USERASSISTANT:") for character in text} - {" "} | {"▁", "\n"}
    )
    special = ["<unk>", "<s>", "</s>", "<image>"]
    words = [text.replace(" ", "▁") for text in SENTENCES]
    core.train_from_iterator(
        words, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, vocab_size=250)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    encoder = Encoder(tokenizer)
    example = encoder.encode(talk("Who founded Arven?", "Mira Solt.", "Which year?", "The year 1312."))
    chosen = example["input_ids"][example["labels"] != -100]
    spoken = "".join(tokenizer.convert_ids_to_tokens(chosen.tolist())).replace("▁", " ")
    assert spoken == " Mira Solt.</s> The year 1312.</s>"
    prompt = _prompt(encoder, talk("Who founded Arven?", "Mira Solt."))
    first = example["labels"].ne(-100).nonzero()[0].item()
    torch.testing.assert_close(example["input_ids"][:first], prompt)
