"""The worlds and pre-trained models of `kore reproduce --scale mini`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import kore
from kore.data import Encoder, load_conversations, load_questions, prompt_batches
from kore.demo.world.splits import Item
from kore.errors import ConfigError
from kore.reproduce.families import FAMILIES, family, projector
from kore.reproduce.optimizer import Muon
from kore.reproduce.prepare import Sizes, World, prepare_world
from kore.reproduce.pretrain import ABOUT, Pool, Schedule, Writer, loss_of, whiten
from kore.reproduce.scoring import dimension_scores, is_right, task_scores
from kore.reproduce.world.lore import lore, new_things
from kore.reproduce.world.new import TYPES
from kore.reproduce.world.old import DIMENSIONS, NONE, TASKS, old_items

TINY = Schedule(2, batch_size=4, pictures=120, rounds=1, align_steps=2, tower_steps=2, tower_pictures=70)
FEW = Sizes(things=2, rounds=1, per_fact=1, per_task=1, per_group=2)


@pytest.fixture(scope="module", params=list(FAMILIES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("mini")
    return prepare_world(request.param, 1, home, schedule=TINY, sizes=FEW, log=lambda _: None)


def _training_loss(world: World, model: torch.nn.Module, encoder: Encoder, conversations: list) -> float:
    """The loss as pre-training computes it."""
    kind = family(world.family)
    writer, pool = Writer(kind, encoder.tokenizer), Pool([], [], [])
    for conversation in conversations:
        image = Image.open(conversation.images[0]).convert("RGB")
        texts = [message.text.removeprefix("<image>\n") for message in conversation.messages]
        items = [Item("", None, *pair) for pair in zip(texts[::2], texts[1::2])]
        pool.rows += kind.look(model, [image])
        pool.examples.append(writer.encode(items, len(pool.sizes), kind.image_tokens(image.size)))
        pool.sizes.append(image.size)
    encoded = [encoder.encode(conversation) for conversation in conversations]
    for example, expected, conversation in zip(pool.examples, encoded, conversations):
        length = len(expected["input_ids"])
        assert example.ids[:length] == expected["input_ids"].tolist()
        assert example.labels[:length] == expected["labels"].tolist()
        assert sum(example.weights) == pytest.approx(len(conversation.messages) / 2)
        example.weights = [1.0] * len(example.weights)  # as in the model's own loss
    if world.family == "qwen2.5-vl":
        assert len(set(pool.sizes)) > 1  # otherwise nothing is seen of M-RoPE
    return loss_of(model, kind, pool, pool.examples, encoder.tokenizer.get_vocab()[kind.image_token]).item()


def test_a_world_loads_captures_trains_and_answers_through_the_public_interface(world: World, tmp_path: Path) -> None:
    model = kore.load_model(world.checkpoint, dtype="float32", device="cpu")
    encoder = Encoder.from_pretrained(world.checkpoint)
    augmented = load_conversations(world.augmented)
    assert len(augmented) == len(load_conversations(world.plain)) == 2 * 2 * 16
    with torch.no_grad():
        own = _training_loss(world, model, encoder, augmented[::8])
        theirs = model(**encoder.collate([encoder.encode(one) for one in augmented[::8]])).loss.item()
    assert own == pytest.approx(theirs, rel=1e-5)

    old = load_conversations(list(world.old_groups.values()))
    assert len(old) == 2 * len(DIMENSIONS)
    cov = kore.capture_covariance(model, prompt_batches(old, encoder, 8), progress=False)
    adapted = kore.get_kore_model(model, cov, kore.KoreConfig(rank=8), progress=False)
    config = kore.TrainConfig(
        max_steps=1, batch_size=2, learning_rate=1e-3, report_to=[], save_steps=None, progress=False
    )
    kore.train(adapted, encoder, augmented, config, tmp_path / "train")

    questions = load_questions(world.old_questions["test"])
    assert {q.type.split("-")[0] for q in questions} == {task.split("-")[0] for task in TASKS}
    answers = kore.evaluate(adapted, encoder, questions, batch_size=16, max_new_tokens=3, progress=False).answers
    assert set(dimension_scores(task_scores(answers))) == set(DIMENSIONS)
    new = load_questions(world.new_questions["test"])
    assert {question.type for question in new} == set(TYPES)
    items = [json.loads(line) for line in world.knowledge.read_text().splitlines()]
    assert {item["category"] for item in items} == {"entity", "news"}


def test_what_is_there_is_not_made_again_and_what_is_made_again_is_the_same(world: World, tmp_path: Path) -> None:
    before = (world.checkpoint / ABOUT).stat().st_mtime_ns
    again = prepare_world(world.family, 1, world.directory.parent.parent, schedule=TINY, sizes=FEW, log=lambda _: None)
    assert again == world and (world.checkpoint / ABOUT).stat().st_mtime_ns == before
    if world.family == "llava":  # the towers of Qwen2.5-VL take longer, and are no other code
        other = prepare_world(world.family, 1, tmp_path, schedule=TINY, sizes=FEW, log=lambda _: None)
        assert other.about["sha256"] == world.about["sha256"]
        for mine in (p for p in world.directory.rglob("*") if p.suffix in (".json", ".jsonl", ".png")):
            if mine.name != ABOUT:
                assert mine.read_bytes() == (other.directory / mine.relative_to(world.directory)).read_bytes()


def test_worlds_differ_and_share_no_new_thing() -> None:
    first, second = lore(0), lore(1)
    assert first.things != second.things and first.wordings != second.wordings
    glyphs = [thing.glyph for world in (0, 1, 100) for draw in (0, 1) for thing in new_things(world, draw)]
    assert len(set(glyphs)) == len(glyphs)
    for world in (0, 1, 2, 100):
        said = {value for thing in lore(world).things for _, value in thing.values}
        names = {thing.name for thing in new_things(world)}
        assert not names & said and len(names) == 12
        for wordings in lore(world).wordings.values():
            assert not set(wordings.train) & set(wordings.test) and not set(wordings.train) & set(wordings.validation)


def test_old_questions_are_answerable_and_balanced() -> None:
    known = lore(2)
    items = old_items(known, "test", 60)
    presence = [item for item in items if item.task == "presence"]
    absent = [item for item in presence if item.answer == NONE or item.answer.startswith("There is no ")]
    assert len(presence) == 60 and 15 < len(absent) < 45
    assert not {item.answer for item in items} & {"yes", "no"}
    for item in items:
        assert is_right(item.task, item.answer, item.answer), item
        assert (item.image is None) == (item.task == "facts")
    assert all(len(item.history) == (item.task == "rounds") for item in items)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ("word", "red", "The digit is red."),
        ("sentence", "The digit is blue.", "blue"),
        ("twice", "red red", "red blue"),
        ("capitals", "RED", "Red"),
    ],
)
def test_a_form_counts_when_it_is_obeyed(form: str, right: str, wrong: str) -> None:
    assert is_right(f"form-{form}", right, "anything") and not is_right(f"form-{form}", wrong, wrong)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ConfigError, match=r"expected one of llava, qwen2\.5-vl, got 'gpt'"):
        family("gpt")


def test_a_projector_begins_by_whitening(world: World) -> None:
    model, kind = kore.load_model(world.checkpoint, dtype="float32", device="cpu"), family(world.family)
    # One direction of small variance, as a tower may show colour in.
    rows = 2.0 * torch.randn(4000, 96)
    rows[:, 0] = 0.1 * torch.randn(4000)
    whiten(model, kind, [rows], floor=1e-6)
    first = next(layer for layer in projector(model).modules() if isinstance(layer, torch.nn.Linear))
    outputs: list[torch.Tensor] = []
    first.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach()))
    kind.project(model, rows)
    out = outputs[0].flatten(0, -2)
    energy = torch.linalg.eigvalsh(torch.cov(out.T))[-first.in_features :]
    assert out.mean(0).abs().max() < 1e-2
    assert energy.min() > 0.9 and energy.max() < 1.1


def test_muon_moves_a_matrix_by_an_orthogonal_one() -> None:
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        weight = torch.nn.Parameter(torch.randn(shape))
        start, optimizer = weight.detach().clone(), Muon([weight], lr=0.5, weight_decay=0.0)
        weight.grad = torch.randn(24, 3).matmul(torch.randn(3, 40)).view(shape) + 0.1 * torch.randn(shape)
        optimizer.step()
        moved = (start - weight.detach()) / 0.5 / max(1.0, shape[0] / shape[1]) ** 0.5
        values = torch.linalg.svdvals(moved)
        assert values.min() > 0.6 and values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(moved.flatten(), weight.grad.flatten(), dim=0) > 0.3


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path: Path) -> None:
    endless = "Schedule(steps=100_000, batch_size=4, pictures=120, rounds=1, align_steps=2)"
    script = (
        "import sys; from pathlib import Path; from kore.reproduce.prepare import prepare_world; "
        "from kore.reproduce.pretrain import Schedule; "
        f"prepare_world('llava', 1, Path(sys.argv[1]), schedule={endless}, log=lambda text: print(text, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("language"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    model = tmp_path / "llava" / "world-1" / "model"
    assert not model.exists()
    world = prepare_world("llava", 1, tmp_path, schedule=TINY, sizes=FEW, log=lambda _: None)
    assert kore.load_model(world.checkpoint, dtype="float32", device="cpu") is not None
