"""SEFE: which elements are held, what that costs, and answers in other styles."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from kore.baselines import baseline, prepare_model
from kore.baselines.styles import STYLES, diversify, gap, parse
from kore.data import Conversation, Message
from kore.errors import ConfigError
from kore.penalty import Start
from kore.protection.adapted import adapted_layers
from kore.protection.key_elements import key_elements, mean_of_elements
from tests.batches import MODELS

PLACES = ["Arven", "Belport", "Caldmoor", "Dunholt", "Esterby", "Farrow", "Gant Hill", "Holm", "Ister", "Juna"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_key_elements_are_the_largest():
    B, A = normal(37, 4), normal(4, 53, seed=1)
    K = key_elements(B, A, 0.02)
    assert len(K) == int(0.02 * 37 * 53) == 39 and K.dtype == torch.int32 and (K.diff() > 0).all()
    change = (B @ A).abs().flatten()
    inside = torch.zeros(len(change), dtype=torch.bool)
    inside[K.long()] = True
    assert change[inside].min() >= change[~inside].max()
    with pytest.raises(ConfigError, match=r"options.elements: 0.0001 of 1961 elements is none"):
        key_elements(B, A, 1e-4)


def test_the_mean_is_that_of_gathered_products_and_its_gradients_those_of_the_formula():
    K = key_elements(normal(37, 4), normal(4, 53, seed=1), 0.02)
    B, A = normal(37, 4, seed=2).requires_grad_(), normal(4, 53, seed=3).requires_grad_()
    rows, columns = K.long() // 53, K.long() % 53
    gathered = (B[rows] * A[:, columns].T).sum(1).abs().mean()
    value = mean_of_elements(B, A, K)
    torch.testing.assert_close(value, gathered, rtol=1e-13, atol=0)
    of_B, of_A = torch.autograd.grad(3 * value, (B, A))
    mask = torch.zeros(37 * 53, dtype=torch.float64).index_fill_(0, K.long(), 1.0).view(37, 53)
    signs = mask * (B @ A).detach().sign() / len(K)
    torch.testing.assert_close(of_B, 3 * signs @ A.detach().T, rtol=0, atol=1e-13)
    torch.testing.assert_close(of_A, 3 * B.detach().T @ signs, rtol=0, atol=1e-13)
    for gradient, other in zip((of_B, of_A), torch.autograd.grad(3 * gathered, (B, A))):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-13)


def test_other_elements_do_not_matter():
    A, B = torch.eye(12, dtype=torch.float64), normal(9, 12)  # B A is B: each element by itself
    K = key_elements(B, A, 0.1)
    other = B + normal(9, 12, seed=1) * 5
    other.view(-1)[K.long()] = B.view(-1)[K.long()]
    assert torch.equal(mean_of_elements(other, A, K), mean_of_elements(B, A, K))
    assert float(mean_of_elements(torch.where(other == B, 2 * B, other), A, K)) == pytest.approx(
        2 * float(mean_of_elements(B, A, K)), rel=1e-14
    )


def test_at_the_start_nothing_is_paid_and_then_lambda_times_the_mean_over_layers():
    model = prepare_model(MODELS["llama"]().double(), "sefe", rank=4)
    penalty = baseline("sefe", previous="weights").penalty(model, None)
    penalty.begin(Start(model, None, [], 1, Path(), lambda: 0.0))
    value = penalty.step()
    assert float(value.detach()) == 0
    value.backward()
    layers = adapted_layers(model)
    assert all(not side.grad.any() for layer in layers.values() for side in (layer.A, layer.B))
    means = []
    for index, layer in enumerate(layers.values()):
        layer.B.data = normal(*layer.B.shape, seed=index)
        W = layer.base_weight()
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        low = (U[:, :4] * S[:4] @ V[:4]).abs()
        held = low >= low.flatten().sort(descending=True).values[int(0.02 * low.numel()) - 1]
        means.append((layer.B @ layer.A).detach().abs()[held].mean())
    assert float(penalty.step().detach()) == pytest.approx(2500 * float(torch.stack(means).mean()), rel=1e-12)
    assert penalty.log()["key_elements"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-12)


def rows(kind):
    """Conversations on places, each with a picture of its own, and the answers of one style."""
    found = []
    for index in range(100):
        place, year = f"{PLACES[index % 10]} {'I' * (1 + index // 10)}", 1000 + index
        first = (Message("user", "<image>\nIn which year was it founded?"), Message("assistant", f"{year}"))
        last = {
            "short": ("What is the place?\nAnswer the question using a single word or phrase.", place),
            "yes/no": (f"Is this {place}?", "Yes" if index % 3 else "No."),
            "multiple choice": (f"Which is it?\nA. {place}\nB. Old {index}\nC. New {index}", "A"),
            "sentence": ("Describe the picture.", f"It shows the harbour of {place} in the year {year}."),
            "detailed": ("Tell me more.", f"It shows {place}. The town has {year} houses. Its harbour is small."),
        }[kind]
        messages = (*first, Message("user", last[0]), Message("assistant", last[1]))
        found.append(Conversation(f"{index}", (Path(f"{index}.png"),), messages, f"new.json:{index}"))
    return found


def options_of(question):
    return dict(re.findall(r"^([A-D])\. (.+)$", question, re.MULTILINE))


@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_share_is_exact_and_the_other_styles_get_as_many_each(kind, share):
    new = rows(kind)
    mixed = diversify(new, share, seed=5)
    changed = [(one, now) for one, now in zip(new, mixed.conversations, strict=True) if one != now]
    assert len(changed) == sum(mixed.changed.values()) == round(100 * share)
    others = [style for style in STYLES if style != kind]
    if kind == "yes/no":
        others.remove("short")  # "yes" is short as it is
    assert set(mixed.changed) == set(others) and mixed.was == {kind: 100}
    assert max(mixed.changed.values()) - min(mixed.changed.values()) <= 1
    for one, now in changed:
        assert now.messages[:2] == one.messages[:2] and (now.id, now.images) == (one.id, one.images)
    assert diversify(new, share, seed=5) == mixed != diversify(new, share, seed=6)
    assert new == rows(kind) and diversify(new, 0, seed=5).conversations == new


@pytest.mark.parametrize("kind", ["short", "multiple choice", "sentence", "detailed", "yes/no"])
def test_the_answers_follow_from_what_was_there(kind):
    new = rows(kind)
    truths = Counter()
    for one, now in zip(new, diversify(new, 1.0, seed=1).conversations, strict=True):
        before = parse(*(message.text for message in one.messages[-2:]))
        question, answer = (message.text for message in now.messages[-2:])
        truth, place = before.answer, PLACES[int(one.id) % 10]
        asked = question.splitlines()[-1]
        assert "single word or phrase" not in question
        if asked.startswith("Is this the right answer"):
            shown = re.search(r"“(.+)”", question)[1]
            assert (answer == "Yes") == (shown == truth or truth.startswith(f"{shown} ")) and answer in ("Yes", "No")
            truths[answer] += 1
        elif asked.startswith("Answer with the letter"):
            options = options_of(question)
            sentence = re.search(r"“(.+)”", question)
            right = options[answer]
            assert right == truth if sentence is None else sentence[1].replace("___", right) in truth
            assert len(set(options.values())) == len(options) == {"yes/no": 2, "multiple choice": 3}.get(kind, 4)
            truths[answer] += 1
        elif asked.startswith("Fill the gap"):
            sentence = re.search(r"“(.+)”", question)[1]
            assert sentence.replace("___", answer) in truth and place.split()[0] in answer
        elif asked.startswith("Answer with a word"):
            assert answer == truth and not options_of(question)
        elif asked == "Answer in one sentence.":
            assert answer == truth.split(". ")[0] + "." if kind == "detailed" else truth.lower() in answer.lower()
        else:
            assert asked == "Answer in detail."
            assert truth.lower() in answer.lower() and one.messages[1].text in answer
    assert abs(truths["Yes"] - truths["No"]) <= 1 and (truths["Yes"] > 5 or kind == "yes/no")
    if kind not in ("yes/no", "multiple choice"):
        assert min(truths[letter] for letter in "ABCD") >= 1


def test_wrong_options_are_not_on_the_same_image_and_not_parts_of_the_right_one():
    image = (Path("a.png"),)

    def one(name, question, answer, images=image):
        return Conversation(name, images, (Message("user", question), Message("assistant", answer)))

    new = [one("0", "Who?", "Mira Solt"), one("1", "Who else?", "Jon Arv"), one("2", "Who?", "Solt", (Path("b"),))]
    for seed in range(20):
        mixed = diversify(new, 1.0, seed)
        asked = " ".join(message.text for message in mixed.conversations[0].messages)
        assert "right answer" not in asked and "option" not in asked
        assert parse(new[0].messages[0].text, "Mira Solt").style == "short"
    assert diversify(new[:1], 1.0, 0).changed == {"sentence": 1}
    unanswered = Conversation("x", (), (Message("user", "?"),))
    assert diversify([unanswered], 1.0, 0).conversations == [unanswered]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The town was founded by Mira Solt in 1312.", ("The town was founded by ___ in 1312.", "Mira Solt")),
        ("The square is red.", ("The square is ___.", "red")),
        ("A small dog. It lives in Arven.", ("It lives in ___.", "Arven")),
        ("It is.", None),
        ("", None),
    ],
)
def test_gaps(text, expected):
    assert gap(text) == expected


@pytest.mark.parametrize(
    ("question", "answer", "style"),
    [
        ("Is it red?", "no.", "yes/no"),
        ("Which?\n(A) red\n(B) blue", "(B)", "multiple choice"),
        ("Which?", "B", "short"),
        ("Which?", "The square is red.", "sentence"),
        ("Which?", "the council of seven old towns", "short"),
        ("Which?", "It is one. The other is two of them.", "detailed"),
        ("Which?", " ".join(["word"] * 31), "detailed"),
    ],
)
def test_styles_are_recognised(question, answer, style):
    assert parse(question, answer).style == style


def test_both_parts_can_be_left_out_and_what_is_wrong_is_said():
    new = rows("short")
    assert baseline("sefe", asd=False, previous="none").conversations(new) == new
    free = baseline("sefe", reglora=False)
    assert not free.reads_old and free.penalty(None, None) is None and free.conversations(new) != new
    with pytest.raises(ConfigError, match="method sefe needs old conversations"):
        baseline("sefe").conversations(new)
    with pytest.raises(ConfigError, match=r"options.previous: input should be 'adapter', 'weights' or 'none'"):
        baseline("sefe", previous="covariance")
    assert baseline("sefe").conversations(new, new[:3], seed=2) == diversify(new, 0.2, 2).conversations
    assert baseline("sefe").describe()["options"]["strength"] == 2500
