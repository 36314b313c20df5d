"""``kore augment`` through ``transformers serve``: a real OpenAI-compatible server with a small model.

    pip install fastapi uvicorn && python -m benchmarks.augmentation_serve

No instruction-tuned model is small enough for a test machine. So a small Llama is trained, in some minutes, to say the
answers of ``augmentation_answers.json`` to the very prompts of four of the twelve items of ``examples/knowledge``; to
those of the others it says something of the same sort, which the checks have to refuse. Server, protocol, tokens,
structured outputs (which this server ignores), retries and reports are real. In the middle the server is killed and
started again. The numbers go to ``benchmarks/results/augmentation_serve.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.augmentation_faults import ROOT, damaged, failures, files_of, unaccounted
from benchmarks.augmentation_servers import ANSWERS, EXAMPLE
from kore.artifacts import atomic_write, read_json

RESULT = Path(__file__).parent / "results" / "augmentation_serve.json"
SERVE = os.path.join(os.path.dirname(sys.executable), "transformers")
LEARNT = ("sts-93", "grace-hopper", "espresso", "gravel")
"""Items whose answers the model learns."""
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
Example = tuple[Sequence[Mapping[str, str]], str]


def prompts(folder: Path) -> list[Example]:
    """What is asked for each item, as the run itself asks it, and what should be answered."""
    from kore.augmentation.config import AugmentConfig
    from kore.augmentation.run import augment
    from kore.augmentation.types import Reply, Request

    answers, asked = json.loads(ANSWERS.read_text("utf-8")), []
    ids = {row["text"]: row["id"] for row in map(json.loads, (EXAMPLE / "knowledge.jsonl").open(encoding="utf-8"))}

    class Recorder:
        corrects = False

        def identity(self) -> Mapping[str, Any]:
            return {"generator": "recorder"}

        def generate(self, request: Request) -> Reply:
            item = ids[request.item.text]
            answer = json.dumps(answers[item][request.task], ensure_ascii=False)
            if item in LEARNT:
                asked.append((request.messages, answer))
            return Reply(answer)

    pictures = {"kind": "folder", "path": EXAMPLE / "pictures"}
    config = AugmentConfig.model_validate({"quality": False, "images": pictures})
    augment(EXAMPLE / "knowledge.jsonl", config, folder, progress=False, generator=Recorder())
    return asked


def tokenizer(examples: Sequence[Example]) -> Any:
    """Byte-level BPE of a chat model, its words learnt from the prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [message["content"] for messages, _ in examples for message in messages]
    backend.train_from_iterator([*texts, *(answer for _, answer in examples)], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=8192
    )
    made.chat_template = TEMPLATE
    return made


def learnt(folder: Path, examples: Sequence[Example], seconds: float) -> dict[str, Any]:
    """A model directory whose model says the answers, trained for at most so long."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(examples)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    rows = []
    for messages, answer in examples:
        prompt = words.apply_chat_template(
            [dict(each) for each in messages], tokenize=False, add_generation_prompt=True
        )
        asked = words(prompt, add_special_tokens=False)["input_ids"]
        told = [*words(answer, add_special_tokens=False)["input_ids"], 1]
        rows.append((torch.tensor([asked + told]), torch.tensor([[-100] * len(asked) + told])))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    started, steps, worst = time.perf_counter(), 0, float("inf")
    while worst > 0.02 and time.perf_counter() - started < seconds:
        worst = 0.0
        for tokens, labels in rows:
            loss = model(tokens, labels=labels).loss
            loss.backward()
            worst = max(worst, loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        print(f"{steps} steps, worst loss {worst:.3f}", flush=True)
    model.eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return {"steps": steps, "worst_loss": round(worst, 4), "seconds": round(time.perf_counter() - started)}


class Server:
    """``transformers serve`` on loopback."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model, self.log = model, log
        self.start()

    def start(self) -> None:
        command = [SERVE, "serve", str(self.model), "--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1)
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no server: {self.log.read_text()[-2000:]}") from None
                time.sleep(0.2)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start(out: Path, server: Server, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kore", "augment", str(EXAMPLE / "knowledge.jsonl"), "-o", str(out)]
    command += ["--images", str(EXAMPLE / "pictures"), "-m", str(server.model)]
    command += ["--base-url", f"http://127.0.0.1:{server.port}/v1", "--workers", "2"]
    command += ["--set", "generator.temperature=0", "--set", "attempts=2", "--set", "limits.backoff=0.5"]
    with open(log, "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait(1800) != 0:
        raise RuntimeError(f"kore augment failed: {log.read_text()[-2000:]}")


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    """Train, serve, run in peace, run with the server killed in between, and run again."""
    trained = learnt(folder / "model", prompts(folder / "prompts"), seconds)
    server = Server(folder / "model", folder / "serve.log")
    calm, rough, log = folder / "calm", folder / "rough", folder / "augment.log"
    try:
        started = time.perf_counter()
        finish(start(calm, server, log), log)
        took = time.perf_counter() - started
        process = start(rough, server, log)
        time.sleep(took * 0.5)
        interrupted = process.poll() is None
        server.kill()
        time.sleep(1)
        server.start()
        finish(process, log)
        stats = read_json(rough / "run.json")
        finish(start(rough, server, log), log)
        again = read_json(rough / "run.json")
    finally:
        server.kill()
    before, after, calm_stats = files_of(calm), files_of(rough), read_json(calm / "run.json")
    made = read_json(rough / "manifest.json")
    return {
        "training": trained,
        "items": made["made_from"]["items"],
        "items_learnt": len(LEARNT),
        "samples": made["samples"],
        "failures": [f"{row['item']} {row['task']}: {row['reason']}" for row in failures(rough)],
        "seconds": round(took, 1),
        "accounting": calm_stats["accounting"],
        "server_killed_at_work": interrupted,
        "accounting_when_killed": stats["accounting"],
        "requests_again": again["accounting"]["requests"],
        "files_that_differ": sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)),
        "damaged_files": damaged(rough),
        "unaccounted_tasks": unaccounted(rough),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train-seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.train_seconds)
    import transformers

    from kore.environment import environment

    result = {**result, "transformers": transformers.__version__, "environment": environment()}
    print(json.dumps(result, indent=1, ensure_ascii=False))
    atomic_write(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
