"""Answers of a Hugging Face chat model in this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kore.augmentation.ask import NotGenerated
from kore.augmentation.generators import without_system
from kore.augmentation.types import Reply, Request
from kore.errors import ConfigError, KoreError, ModelError


class LocalGenerator:
    """A chat model, one request after another. Several threads may use one; they take turns.

    Sampling depends on ``Request.seed`` alone: it has its own random state and leaves the process's as it is.

    Args:
        model: A directory with model and tokenizer, or a hub id.
        temperature: Of sampling; 0 takes the likeliest token each time.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` ...
        dtype: ``"auto"`` (the checkpoint's own), ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ModelError: It cannot be loaded, or is no chat model: its tokenizer has no chat template.
    """

    def __init__(
        self, model: str | Path, *, temperature: float = 0.7, device: str = "auto", dtype: str = "auto"
    ) -> None:
        from kore.models import load_model, model_fingerprint

        if temperature < 0:
            raise ConfigError(f"generator.temperature: expected 0 or more, got {temperature}")
        self._name, self._temperature = str(model), temperature
        self._tokenizer = _tokenizer(self._name)
        self._model: Any = load_model(self._name, dtype=dtype, device=device)
        self._fingerprint = model_fingerprint(self._model)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"LocalGenerator({self._name!r}, temperature={self._temperature})"

    def identity(self) -> Mapping[str, Any]:
        return {
            "generator": "local",
            "fingerprint": self._fingerprint,
            "template": self._tokenizer.chat_template,
            "temperature": self._temperature,
            "dtype": str(self._model.dtype),
            "thinks": False,
        }

    def generate(self, request: Request) -> Reply:
        """Answer once.

        Raises:
            NotGenerated: The request is longer than the model reads, or its template refuses the messages.
            KoreError: The device's memory is not enough.
        """
        import torch

        tokens = self._tokens(request)
        length = tokens["input_ids"].shape[1]
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        new = request.max_tokens if room is None else min(request.max_tokens, room - length)
        if new < 1:
            raise NotGenerated(
                f"{self._name}: the request has {length} tokens, the model reads {room}; shorten the text or choose a "
                "model with a longer context"
            )
        with self._lock, torch.random.fork_rng(devices=self._cuda_devices()), torch.inference_mode():
            torch.manual_seed(request.seed)
            try:
                output = self._model.generate(
                    **tokens,
                    max_new_tokens=new,
                    pad_token_id=self._padding(),
                    **self._sampling(),
                )
            except torch.OutOfMemoryError:
                raise KoreError(
                    f"{self._name}: not enough memory for {length} + {new} tokens; choose a smaller model or another "
                    "generator.device"
                ) from None
        answer = output[0, length:]
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        cut = len(answer) == new and int(answer[-1]) not in self._ends()
        problem = "The answer is cut off at the longest one allowed; give a shorter one." if cut else ""
        return Reply(text, prompt_tokens=length, completion_tokens=len(answer), problem=problem)

    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        ends = self._model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def _tokens(self, request: Request) -> dict[str, Any]:
        messages = request.with_form()
        try:
            text = self._prompt(messages)
        except Exception:
            try:
                text = self._prompt(without_system(messages))
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise NotGenerated(f"{self._name}: the chat template refuses the messages ({first})") from None
        encoded = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        return {name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")}

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        # Templates of models that reason have one of these switches; the others do not look at them.
        switches = {"enable_thinking": False, "thinking": False}
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
        )

    def _sampling(self) -> dict[str, Any]:
        if self._temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self._temperature, "top_p": 1.0, "top_k": 0}

    def _padding(self) -> int | None:
        tokenizer = self._tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _cuda_devices(self) -> list[int]:
        device = self._model.device
        return [device.index or 0] if device.type == "cuda" else []


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name}: not a model directory, it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name}: the tokenizer cannot be loaded ({type(error).__name__}: {first})") from error
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{name}: expected a chat model, its tokenizer has no chat template; choose the instruction-tuned variant "
            "of the model"
        )
    return tokenizer
