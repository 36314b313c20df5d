"""Answers of a chat model in this process. The model is random: what is tested is all but the sense of its words."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch

from kore.augmentation.ask import Asker, NotGenerated
from kore.augmentation.cache import Cache
from kore.augmentation.generators import make_generator
from kore.augmentation.generators.local import LocalGenerator
from kore.augmentation.limits import Limits
from kore.augmentation.schema import Caption
from kore.augmentation.types import KnowledgeItem, Request
from kore.errors import ConfigError, ModelError
from tests.tiny import tiny_llama

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORM = "Reply with one JSON object that has a summary and what is depicted, and with nothing else beside it."
ITEM = KnowledgeItem("a", "entity", "city", "Arven", "Arven is a city.")


def _tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    if template:
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    tiny_llama(max_position_embeddings=2048, eos_token_id=1, bos_token_id=0, pad_token_id=2).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return LocalGenerator(folder, temperature=0.8, device="cpu")


def request(**changes):
    messages = ({"role": "user", "content": "Describe Arven."},)
    values = dict(task="caption", item=ITEM, messages=messages, schema=Caption, max_tokens=12, seed=3, form=FORM)
    return Request(**{**values, **changes})


def test_a_seed_decides_and_the_process_is_left_alone(generator):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = generator.generate(request())
    assert torch.equal(torch.rand(3), expected)
    assert generator.generate(request()) == first
    assert generator.generate(request(seed=4)).text != first.text
    assert 0 < first.completion_tokens <= 12 and first.prompt_tokens > 100 and "cut off" in first.problem


def test_the_prompt_is_the_template_with_the_schema(generator, monkeypatch):
    seen = []
    original = generator._model.generate

    def spy(**arguments):
        seen.append((generator._tokenizer.decode(arguments["input_ids"][0]), arguments))
        return original(**arguments)

    monkeypatch.setattr(generator._model, "generate", spy)
    generator.generate(request())
    ((text, arguments),) = seen
    assert text.startswith("<|im_start|>user\nDescribe Arven.") and text.endswith("<|im_start|>assistant\n")
    assert FORM in text and arguments["max_new_tokens"] == 12 and arguments["do_sample"] is True


def test_a_template_without_a_system_role_gets_its_words_from_the_user(folder, monkeypatch):
    plain = LocalGenerator(folder, device="cpu")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(plain._tokenizer, "chat_template", refusing)
    messages = ({"role": "system", "content": "You write JSON."}, {"role": "user", "content": "Describe Arven."})
    text = plain._tokenizer.decode(plain._tokens(request(messages=messages))["input_ids"][0])
    assert text.startswith("<|im_start|>user\nYou write JSON.\n\nDescribe Arven.\n\nReply")
    with pytest.raises(NotGenerated, match="the chat template refuses the messages"):
        monkeypatch.setattr(plain._tokenizer, "chat_template", "{{ raise_exception('never') }}")
        plain.generate(request())


def test_a_model_that_reasons_is_told_not_to(folder, monkeypatch):
    plain = LocalGenerator(folder, device="cpu")
    monkeypatch.setattr(plain._tokenizer, "chat_template", TEMPLATE + "{% if enable_thinking %}<think>{% endif %}")
    text = plain._tokenizer.decode(plain._tokens(request())["input_ids"][0])
    assert text.endswith("assistant\n")


def test_without_temperature_the_likeliest_tokens_are_taken(folder):
    greedy = LocalGenerator(folder, temperature=0, device="cpu")
    assert greedy.generate(request(seed=1)) == greedy.generate(request(seed=2))
    tokens = greedy._tokens(request())["input_ids"]
    with torch.inference_mode():
        first = int(greedy._model(tokens).logits[0, -1].argmax())
    assert greedy._tokenizer.decode([first], skip_special_tokens=True) == greedy.generate(request(max_tokens=1)).text


def test_threads_take_turns_and_get_what_they_would_alone(generator):
    alone = {seed: generator.generate(request(seed=seed)) for seed in range(4)}
    together = {}

    def work(seed):
        together[seed] = generator.generate(request(seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_nonsense_fails_well(generator, tmp_path):
    asker = Asker(generator, Cache(tmp_path), Limits(), attempts=2)
    with pytest.raises(
        NotGenerated, match=r"2 replies were not acceptable, at last: The (reply|JSON|answer is cut off)"
    ):
        asker.ask("caption", ITEM, request().messages, Caption, lambda answer: (answer, []), 12)
    assert asker.accounting.requests == 2 and asker.accounting.completion_tokens > 0


def test_a_request_that_is_too_long_is_refused(generator):
    with pytest.raises(NotGenerated, match=r"the request has \d+ tokens, the model reads 2048"):
        generator.generate(request(messages=({"role": "user", "content": "Arven " * 500},)))


def test_models_that_are_none(tmp_path, folder):
    tiny_llama().save_pretrained(tmp_path)
    _tokenizer(template=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        LocalGenerator(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        LocalGenerator(tmp_path.parent)
    with pytest.raises(ConfigError, match="temperature"):
        LocalGenerator(folder, temperature=-1)


def test_it_is_made_from_a_configuration_and_known_by_its_weights(folder, generator):
    class Config:
        kind, model, temperature, device, dtype = "local", str(folder), 0.8, "cpu", "float32"

    made = make_generator(Config())
    assert made.identity() == generator.identity()
    assert str(folder) not in json.dumps(made.identity())
    with torch.no_grad():
        made._model.lm_head.weight.add_(1.0)
    from kore.models import model_fingerprint

    assert model_fingerprint(made._model) != made.identity()["fingerprint"]


SERVING = importlib.util.find_spec("uvicorn") and importlib.util.find_spec("fastapi")
SERVE = os.path.join(os.path.dirname(sys.executable), "transformers")


@pytest.mark.slow
@pytest.mark.skipif(
    not (SERVING and os.path.exists(SERVE)), reason="needs `transformers serve`: pip install 'transformers[serving]'"
)
def test_a_real_server_process(folder, tmp_path):
    """`transformers serve` with the random model: connection, protocol, token counts, and failing well."""
    pytest.importorskip("openai")
    from kore.augmentation.generators.openai_server import OpenAIGenerator

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(tmp_path / "log", "wb") as log:
        command = [SERVE, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        remote = OpenAIGenerator(str(folder), f"http://127.0.0.1:{port}/v1", timeout=60)
        asker = Asker(remote, Cache(tmp_path / "cache"), Limits(retries=1), attempts=2)
        with pytest.raises(NotGenerated, match="2 replies were not acceptable"):
            asker.ask("caption", ITEM, request().messages, Caption, lambda answer: (answer, []), 12)
        assert asker.accounting.prompt_tokens > 100 and asker.accounting.completion_tokens > 0
    finally:
        server.terminate()
        server.wait(30)
