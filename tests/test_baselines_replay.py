"""Replay: how many old conversations, from which files, and that nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kore.baselines import baseline
from kore.data import Conversation, Message, load_conversations
from kore.data.drawing import draw
from kore.errors import ConfigError
from kore.training import train
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import prepared

SIZES = {"a.json": 600, "b.json": 300, "c:d.json": 101}


def conversations(file, count):
    turns = (Message("user", "?"), Message("assistant", "!"))
    return [Conversation(f"{file} {i}", (), turns, f"{file}:{i + 1}") for i in range(count)]


@pytest.fixture(scope="module")
def old():
    return [one for file, count in SIZES.items() for one in conversations(file, count)]


def files(drawn):
    return Counter(one.source.rpartition(":")[0] for one in drawn)


def test_counts_and_shares_are_exact(old):
    new = conversations("new.json", 1000)
    mixed = baseline("replay").conversations(new, old, seed=3)
    assert len(mixed) == len({one.source for one in mixed}) == 1100 and set(new) < set(mixed)
    drawn = [one for one in mixed if one not in new]
    assert files(drawn) == {"a.json": 60, "b.json": 30, "c:d.json": 10}  # of 59.94, 29.97 and 10.09
    assert mixed == baseline("replay", share=0.1).conversations(new, old, seed=3)
    other = baseline("replay").conversations(new, old, seed=4)
    assert set(other) != set(mixed) and files(other) == files(mixed)
    assert mixed[:1000] != new, "old ones would come last where nothing shuffles"


def test_every_old_conversation_is_as_likely_as_another():
    old = conversations("a", 12) + conversations("b", 6)
    times = Counter(one.id for seed in range(600) for one in draw(old, 6, seed))
    assert len(times) == 18 and all(150 < count < 250 for count in times.values())


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000, 5000])
def test_the_rounded_shares_add_up(old, count):
    drawn = draw(old, count, 0)
    assert len(drawn) == len(set(drawn)) == min(count, len(old))
    assert drawn == sorted(drawn, key=old.index)
    for file, there in files(drawn).items():
        assert abs(there - len(drawn) * SIZES[file] / len(old)) < 1


def test_what_is_wrong_is_said(old):
    new = conversations("new", 30)
    with pytest.raises(ConfigError, match=r"needs old conversations with answers; add old.files \(kore train: --old\)"):
        baseline("replay").conversations(new)
    with pytest.raises(ConfigError, match=r"0.1 of 30 new conversations is 3, and there are 2 old ones"):
        baseline("replay").conversations(new, old[:2])
    with pytest.raises(ConfigError, match=r"0.01 of 30 new conversations is none"):
        baseline("replay", share=0.01).conversations(new, old)
    for share, words in ((-1, "greater than or equal to 0"), ("a lot", "valid number"), (float("inf"), "finite")):
        with pytest.raises(ConfigError, match=rf"options.share: .*{words}"):
            baseline("replay", share=share)
    with pytest.raises(ConfigError, match=r"options.shares: no such option of method replay; it has share"):
        baseline("replay", shares=0.1)


@pytest.mark.slow
def test_a_share_of_nothing_trains_as_lora_does(tmp_path):
    save_tiny("llama", tmp_path / "llama")
    new = load_conversations(tiny_conversations(tmp_path / "new", 6, text_only=True))
    old = load_conversations(tiny_conversations(tmp_path / "old", 8, text_only=True))
    config = dict(epochs=1, batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=None, report_to=[])
    trained, histories = {}, {}
    for label, method, options in (("lora", "lora", {}), ("replay", "replay", {"share": 0})):
        model, encoder = prepared("llama", tmp_path, method)
        data = baseline(method, **options).conversations(new, old)
        histories[label] = train(model, encoder, data, {**config, "progress": False}, tmp_path / label).history
        trained[label] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert histories["replay"] == histories["lora"] and len(histories["lora"]) == 3
    for name, value in trained["lora"].items():
        assert torch.equal(trained["replay"][name], value)


def test_a_share_of_nothing_is_the_new_data_in_its_order(old):
    new = conversations("new", 30)
    assert baseline("replay", share=0).conversations(new, old) == new
