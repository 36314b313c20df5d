"""The generator by rules: what it makes of facts and of plain sentences, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from pydantic import BaseModel

from kore.augmentation import checks
from kore.augmentation.ask import Asker, NotGenerated
from kore.augmentation.cache import Cache
from kore.augmentation.generators.rules import (
    RulesGenerator,
    attribute_form,
    beginning,
    given_facts,
    names,
    sentences,
)
from kore.augmentation.limits import Limits
from kore.augmentation.schema import Caption, Dialogue, Questions
from kore.augmentation.types import KnowledgeItem, Request
from kore.errors import KoreError

RULES = RulesGenerator()
TOWER = KnowledgeItem(
    "tower",
    "entity",
    "tower",
    "Eiffel Tower",
    "The Eiffel Tower is a lattice tower in Paris. It is named after Gustave Eiffel, whose company built it. It is 330 "
    "metres tall and opened in 1889. Dr. Smith saw it on the Champ de Mars.",
    facts={"location": "Paris", "height": "330 metres", "designer": "Gustave Eiffel", "paint_job": "brown", "home": ""},
)
NEWS = KnowledgeItem(
    "news",
    "news",
    "politics",
    "Council backs new harbour",
    "The council of Rostock voted for a new harbour on Monday. The vote was 31 to 12.",
    facts={"place": "Rostock"},
)
BARE = KnowledgeItem("bare", "news", "politics", "Harbour", NEWS.text)


def ask(item, schema, task="dialogue", seed=0, attempt=0):
    request = Request(task, item, (), schema, 100, attempt, seed)
    return schema.model_validate(json.loads(RULES.generate(request).text))


@pytest.mark.parametrize("item", [TOWER, NEWS, BARE], ids=lambda item: item.id)
def test_everything_it_makes_passes_the_checks(item):
    for seed in range(8):
        for schema, check in ((Dialogue, checks.check_dialogue), (Caption, checks.check_caption)):
            answer = ask(item, schema, seed=seed)
            assert check(item, answer) == (answer, [])
        if item is not BARE:
            questions = ask(item, Questions, seed=seed)
            assert checks.check_questions(item, questions) == (questions, [])


def test_facts_become_rounds_and_their_sentences_answers():
    rounds = {each.question: each.answer for each in ask(TOWER, Dialogue).rounds}
    answers = list(rounds.values())
    assert answers[0] == "The Eiffel Tower is a lattice tower in Paris."
    # The sentence of the place is told already; those of height and designer are new.
    assert answers[1:4] == ["Paris.", "It is 330 metres tall and opened in 1889.",
                            "It is named after Gustave Eiffel, whose company built it."]  # fmt: skip
    assert all("the Eiffel Tower" in question for question in list(rounds)[:5])


def test_what_facts_leave_is_asked_with_a_gap():
    gaps = {each.question: each.answer for each in ask(TOWER, Dialogue).rounds if "____" in each.question}
    (question,) = gaps
    assert "Dr. Smith saw it on the ____" in question or "____" in question
    assert gaps[question].rstrip(".") in TOWER.text and gaps[question].rstrip(".") not in question


def test_a_gap_is_not_filled_by_the_rest_of_its_sentence():
    text = "the cat came early. in the year of version 2 it was 2 days late, and Paris saw more of Paris again."
    item = KnowledgeItem("x", "entity", "cat", "Zog", text)
    assert not any("____" in each.question for each in ask(item, Dialogue).rounds)


def test_a_fact_that_no_sentence_holds_is_answered_by_its_value():
    assert dict(given_facts(TOWER)).keys() == {"location", "height", "designer", "paint_job"}
    rounds = {each.question: each.answer for each in ask(TOWER, Dialogue).rounds}
    assert next(answer for question, answer in rounds.items() if "paint job" in question) == "Brown."


def test_the_wording_of_an_attribute_and_the_general_one():
    item = KnowledgeItem(
        "x", "entity", "tool", "Zog", "Zog lives at Bern and is of grade 7.", facts={"Home": "Bern", "top-grade": "7"}
    )
    questions = {each.answer: each.question for each in ask(item, Questions, "vqa").questions}
    assert questions["Bern"] in ("Where does Zog live?", "What is the home of Zog?")
    assert "top grade of Zog" in questions["7"]


def attribute_question(attribute, value, **changes):
    item = dataclasses.replace(TOWER, facts={attribute: value}, **changes)
    return {ask(item, Questions, "vqa", seed=seed).questions[0].question for seed in range(20)}


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("lanes", "4", {"How many lanes does Eiffel Tower have?", "What is the number of lanes of Eiffel Tower?"}),
        ("works", "Sea, Sand", {"What are the works of Eiffel Tower?", "Name the works of Eiffel Tower.",
                                "Tell me the works of Eiffel Tower."}),
        ("Series", "Tall", {"What is the series of Eiffel Tower?", "Name the series of Eiffel Tower.",
                            "Tell me the series of Eiffel Tower."}),
        ("ISO code", "zz", {"What is the ISO code of Eiffel Tower?", "Name the ISO code of Eiffel Tower.",
                            "Tell me the ISO code of Eiffel Tower."}),
        ("owned_by", "Zog", {"By whom was Eiffel Tower owned?"}),
        ("restored", "1999", {"When was Eiffel Tower restored?"}),
        ("known for", "rust", {"Eiffel Tower, known for?"}),
        ("seed", "oak", {"What is the seed of Eiffel Tower?", "Name the seed of Eiffel Tower.",
                         "Tell me the seed of Eiffel Tower."}),
    ],
)  # fmt: skip
def test_the_wording_fits_the_form_of_the_attribute(attribute, value, expected):
    assert attribute_question(attribute, value) == expected


def test_news_are_asked_for_what_an_event_has():
    event = dict(category="news", title="Storm")
    assert attribute_question("place", "Rome", **event) == {
        "Where did Storm take place?", "What was the place of Storm?",
    }  # fmt: skip
    assert attribute_question("director", "Ann Bo", **event) == {
        "What director is reported for Storm?", "Which director goes with Storm?",
    }  # fmt: skip


def test_texts_in_another_language():
    text = "Der Turm ist das höchste Bauwerk. Er wurde am 3. Oktober 1969 eröffnet. Er steht in Ulm."
    item = KnowledgeItem("t", "entity", "Turm", "Turm", text, facts={"Höhe": "368 Meter", "Ort": "Ulm"})
    assert sentences(text)[1] == "Er wurde am 3. Oktober 1969 eröffnet."
    questions = ask(item, Questions, "vqa").questions
    assert [each.question for each in questions] == ["Turm, Höhe?", "Turm, Ort?"]


def test_no_sentence_is_left_out_where_rounds_are_left():
    item = KnowledgeItem("a", "entity", "animal", "Aye", "The aye eats. It has very long fingers. It is never awake.")
    rounds = ask(item, Dialogue).rounds
    assert {each.answer for each in rounds} == set(sentences(item.text))
    assert checks.check_dialogue(item, Dialogue(rounds=rounds))[1] == []


def test_a_headline_that_the_text_repeats_is_no_answer_to_a_question_with_it():
    item = KnowledgeItem("n", "news", "x", "Zog lives in joy", "It is a day of great joy for all. Zog lives in joy.")
    rounds = ask(item, Dialogue).rounds
    assert [each.answer for each in rounds] == ["It is a day of great joy for all."]


def test_an_answer_that_the_question_or_the_kind_tells_is_not_asked_for():
    text = "Noor Haddad (NHD) is a singer of the Blue Band and lives in Bern with two dogs."
    item = KnowledgeItem("n", "entity", "singer", "Noor Haddad", text, facts={"occupation": "singer", "home": "Bern"})
    for seed in range(6):
        questions = ask(item, Questions, "vqa", seed=seed)
        assert {each.answer for each in questions.questions} == {"Bern"}


def test_visual_questions_are_about_the_item():
    found = ask(TOWER, Questions, "vqa").questions
    assert {each.answer for each in found[:4]} == {"Paris", "330 metres", "Gustave Eiffel", "brown"}
    assert all(each.subject == "Eiffel Tower" and each.subject in each.question for each in found)
    assert {each.hypernym for each in found} == {"tower"}
    assert {each.hypernym for each in ask(NEWS, Questions, "vqa").questions} == {"event"}


def test_a_question_that_holds_its_answer_is_not_asked():
    item = KnowledgeItem("x", "entity", "battle", "Battle of Paris", "The Battle of Paris was in Paris.",
                         facts={"place": "Paris", "kind": "battle"})  # fmt: skip
    assert all("Battle of Paris was" in each.answer for each in ask(item, Dialogue).rounds)
    # In a visual question a reference stands for the title, so that it no longer tells.
    (question,) = ask(item, Questions, "vqa").questions
    assert question.answer == "Paris" and checks.check_questions(item, Questions(questions=[question]))[1] == []


def test_an_item_without_anything_says_why():
    item = KnowledgeItem("x", "news", "other", "Nix", "nothing in here has a name or a number.", facts={"a": " "})
    with pytest.raises(NotGenerated, match=r"visual question of 'Nix'.*\(1 given\).*language model"):
        ask(item, Questions, "vqa")


def test_a_schema_of_another_sort_is_refused():
    class Other(BaseModel):
        text: str

    with pytest.raises(KoreError, match=r"no rule for Other.*language model"):
        ask(TOWER, Other)


def test_the_same_request_gives_the_same_answer_and_another_seed_other_words():
    assert ask(TOWER, Dialogue) == ask(TOWER, Dialogue)
    assert len({str(ask(TOWER, Dialogue, seed=seed)) for seed in range(6)}) > 1
    assert RULES.cached is False and "texts" in RULES.identity()


def test_a_refused_round_is_not_replaced_by_the_same_in_other_words(tmp_path):
    asker = Asker(RULES, Cache(tmp_path), Limits(), attempts=3)

    def check(answer):
        return Dialogue(rounds=answer.rounds[1:]), ["Round 1: the answer is not wanted."]

    made = asker.ask("dialogue", TOWER, ({"role": "user", "content": "x"},), Dialogue, check, 100)
    answers = [each.answer for each in made.rounds]
    assert len(set(answers)) == len(answers) and asker.accounting.requests == 1


def test_of_several_sentences_with_a_value_one_has_to_be_about_the_attribute():
    text = (
        "The first coins were an alloy of gold and silver. Their cities used silver. The metal of the rest was copper."
    )
    item = KnowledgeItem("x", "entity", "money", "Zog coinage", text, facts={"main metal": "silver"})
    rounds = {each.question: each.answer for each in ask(item, Dialogue).rounds}
    assert next(answer for question, answer in rounds.items() if "main metal" in question) == "Silver."
    about = "The coins had some silver. Their main metal was silver."
    item = KnowledgeItem("x", "entity", "money", "Zog coinage", "It is old. " + about, facts={"main metal": "silver"})
    rounds = {each.question: each.answer for each in ask(item, Dialogue).rounds}
    assert next(a for q, a in rounds.items() if "main metal" in q) == "Their main metal was silver."


@pytest.mark.parametrize(
    ("title", "sentence", "fits"),
    [
        ("brick", "Whole cities of fired brick were built in Sind.", False),
        ("brick", "A brick wall was built in Sind.", False),
        ("brick", "The temple of brick is in Sind.", True),
        ("Eileen Collins", "In this year Eileen Collins flew for the space agency NASA.", False),
        ("Eileen Collins", "Eileen Collins flew for the space agency of America.", True),
    ],
)
def test_a_visual_question_leaves_no_adjective_before_this(title, sentence, fits):
    item = KnowledgeItem("x", "entity", "thing", title, sentence)
    if fits:
        assert ask(item, Questions, "vqa").questions
    else:
        with pytest.raises(NotGenerated):
            ask(item, Questions, "vqa")


def test_a_long_headline_still_has_a_caption():
    title = "Eileen Collins becomes the first woman to command a space shuttle on its way to the stars"
    item = KnowledgeItem("x", "news", "space", title, "The space shuttle Columbia lifted off on 23 July 1999.")
    for seed in range(4):
        answer = ask(item, Caption, seed=seed)
        assert checks.check_caption(item, answer) == (answer, []) and "space" in answer.depicted


def test_the_number_of_things_is_one_number():
    assert attribute_form("number of moons", "79") == "generic" == attribute_form("source of colours", "iron")
    assert attribute_form("moons", "79") == "count" and attribute_form("works of art", "x") == "plural"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. No met Mr. J. R. Smith. He left.", ["Dr. No met Mr. J. R. Smith.", "He left."]),
        ("It costs 3.50 euros. Really?! Yes.", ["It costs 3.50 euros.", "Really?!", "Yes."]),
        ('He said "Stop." She ran.', ['He said "Stop."', "She ran."]),
        ("The U.S. won in 1990. Then 5. It was", ["The U.S. won in 1990.", "Then 5.", "It was"]),
        ("Head\n\nBody  text.", ["Head", "Body text."]),
        ("巴黎是首都。它很大。", ["巴黎是首都。", "它很大。"]),
        ("  ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_names():
    assert names("In 1889 the French engineer Gustave Eiffel's firm built 2,500 rivets in Paris.") == [
        "1889", "French", "Gustave Eiffel", "2,500", "Paris",
    ]  # fmt: skip
    assert names("Only the first is a capital.") == []
    assert names("It began in the sixth century BC, after 600 BC.") == ["600 BC"]
    assert names('He said: "The end is near, When in Rome" and went to The Hague.') == ["Rome", "Hague"]


def test_the_beginning_has_whole_sentences_where_they_fit():
    assert beginning("One two three. Four five. Six seven eight nine.", 6) == "One two three. Four five."
    long = "word " * 12 + "end, " + "more " * 30 + "stop."
    assert beginning(long, 25) == ("word " * 12 + "end").strip() + "."
    assert beginning("w " * 40, 25).endswith("…") and len(beginning("w " * 40, 25).split()) == 25
    assert beginning("", 25) == ""


def test_it_is_fast():
    started = time.process_time()
    for number in range(200):
        name = f"Tower{number}"
        text = TOWER.text.replace("Eiffel Tower", name)
        item = KnowledgeItem(str(number), "entity", "tower", name, text, facts=TOWER.facts)
        for schema in (Dialogue, Caption, Questions):
            ask(item, schema)
    assert time.process_time() - started < 4
