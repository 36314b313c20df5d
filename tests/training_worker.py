"""A training run in a process of its own: started by the tests under torchrun, and to be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch


def prepared(kind: str, root: Path, method: str = "random-a", dtype: str = "auto", options: Any = None):
    """The tiny model of ``kind`` under ``root``, made trainable, with its encoder."""
    from kore.baselines import prepare_model
    from kore.data import Encoder
    from kore.models import load_model

    rank = {} if method == "full" else {"rank": 18 if method == "moelora" else 4}
    base = load_model(root / kind, dtype=dtype, device="cpu")
    model = prepare_model(base, method, progress=False, options=options, **rank)
    return model, Encoder.from_pretrained(root / kind)


def penalty(model, encoder, conversations, strength: float):
    """Two-sided protection of the conversations, taken as old data; every process captures all of them."""
    from kore import capture_covariance, capture_output_gradients, two_sided
    from kore.data import conversation_batches

    batches = conversation_batches(conversations, encoder, 4)
    options = {"progress": False, "distributed": False}
    cov, gradients = (capture(model, batches, **options) for capture in (capture_covariance, capture_output_gradients))
    return two_sided(model, cov, gradients, strength)


def by_method(model, encoder, root: Path, method: str, options: dict[str, Any]):
    """The data that a baseline trains on and its penalty, with the pictures as new data and the texts as old."""
    from kore.baselines import baseline
    from kore.data import load_conversations

    new = load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")
    old, chosen = load_conversations(root / "text" / "conversations.json"), baseline(method, **options)
    return chosen.conversations(new, old), chosen.penalty(model, encoder, old)


def kill_at(step: int) -> None:
    """Make the Trainer kill this process in the middle of writing the checkpoint of ``step``."""
    from kore.training.trainer import KoreTrainer

    write = KoreTrainer._save_optimizer_and_scheduler

    def save(self, output_dir: str) -> None:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, output_dir)

    KoreTrainer._save_optimizer_and_scheduler = save


def main() -> None:
    root, output, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    from kore.data import load_conversations
    from kore.training import train

    torch.set_num_threads(1)
    if "kill_at" in options:
        kill_at(options["kill_at"])
    model, encoder = prepared(options["kind"], root, options["method"], options=options.get("options"))
    conversations = load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")
    conversations += load_conversations(root / "text" / "conversations.json")
    strength = options.get("strength")
    protection: Any = None if strength is None else penalty(model, encoder, conversations, strength)
    if "options" in options:
        conversations, protection = by_method(model, encoder, root, options["method"], options["options"])
    train(model, encoder, conversations, options["config"], output, penalty=protection)
    rank = os.environ.get("RANK", "0")
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, output / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
