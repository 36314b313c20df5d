"""Which answers are accepted and which are not, and what the reasons say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kore.augmentation.checks import (
    ANSWER_WORDS_AT_MOST,
    SUMMARY_WORDS_AT_MOST,
    check_caption,
    check_dialogue,
    check_questions,
    holds,
    same_question,
    supported,
)
from kore.augmentation.schema import Caption, Dialogue, Quadruplet, Questions, Round
from kore.augmentation.types import KnowledgeItem
from kore.augmentation.words import stem_match, tokenize, word_count

TEXT = (
    "Mira Solt, 52, was elected mayor of Arven on 5 March 2024 with 61.5 percent of the vote. "
    "The World Health Organization praised her plan to build twenty-five clinics for $2.5 million. "
    "Her rival, Dr. Pavel Černý, conceded late in the evening. Fans of the U.S. band Nine Lamps sang until midnight. "
    "The harbour, closed since the 1990s, will reopen."
)
ITEM = KnowledgeItem(
    "arven", "news", "politics", "Solt wins the Arven election", TEXT, facts={"predecessor": "Tomas Brandt"}
)


def dialogue(*pairs, seen=()):
    return check_dialogue(ITEM, Dialogue(rounds=[Round(question=q, answer=a) for q, a in pairs]), seen)


def reasons_for(question, answer):
    return " ".join(dialogue((question, answer))[1])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Who was elected mayor of Arven?", "Mira Solt was elected mayor."),
        ("Who was elected mayor of Arven?", "MIRA SOLT"),
        ("How many clinics are planned?", "25 clinics."),
        ("How many clinics are planned?", "The plan is to build twenty-five clinics."),
        ("How much will the clinics cost?", "They cost 2,500,000 dollars."),
        ("How much will the clinics cost?", "$2.5m"),
        ("When was the election?", "On March 5th, 2024."),
        ("Which organization praised the plan?", "The WHO praised it."),
        ("Who conceded?", "Pavel Cerny"),
        ("Who conceded?", "Doctor Pavel Cerny conceded, Mr Cerny being her rival."),
        ("Which share of the vote did she get?", "61.5 per cent"),
        ("Which share of the vote did she get?", "61.5%"),
        ("When did the harbour close?", "It has been closed since the 1990s."),
        ("Who was mayor before Mira Solt?", "Her predecessor was Tomas Brandt."),
        ("Where is the band from?", "Nine Lamps is a band from the US."),
        ("What happened at night?", "Fans of the band were singing until midnight."),
        ("Did Mira Solt win the election?", "Yes"),
        ("Did Mira Solt win the election?", "Yes, with 61.5 percent of the vote."),
        ("Did she lose?", "No, she was elected mayor of Arven."),
        ("What was won?", "One of the elections in Arven."),
    ],
)
def test_what_the_text_says_is_accepted(question, answer):
    accepted, reasons = dialogue((question, answer))
    assert reasons == [] and accepted.rounds[0].answer == answer


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Who was elected mayor of Arven?", "Anna Berg was elected.", '"Anna", "Berg", which are not in the text'),
        ("Who was elected mayor of Arven?", "Mira Stolt was elected.", '"Stolt", which is not in the text'),
        ("Who was mayor before?", "Tomas Brandtner.", '"Brandtner", which is not in the text'),
        ("Where did she work before?", "Paris.", '"Paris", which is not in the text'),
        ("When was the election?", "On 6 March 2024.", '"6", which is not in the text'),
        ("When was the election?", "In March 2023.", '"2023"'),
        ("How much will the clinics cost?", "3 million dollars", '"3 million"'),
        ("How many clinics are planned?", "Thirty clinics.", '"Thirty"'),
        ("Which share did she get?", "61,5 thousand", '"61,5 thousand"'),
        ("When did the harbour close?", "In the 1980s.", '"1980s"'),
        ("Who praised the plan?", "The UNESCO praised it.", '"UNESCO"'),
        ("What did Barack Obama say?", "Fans sang until midnight.", 'question has "Barack", "Obama"'),
        ("Why did she win in 2019?", "Her plan was praised.", 'question has "2019"'),
        ("Why did Pavel concede?", "Late in the evening he felt tired and wanted sleep.", '"tired", "wanted", "sleep"'),
        ("Who conceded?", "President Cerny", '"President", which is not in the text'),
        ("Who conceded?", "Some person.", "of the 1 content words"),
        ("Is Mira Solt the mayor of Arven?", "Mira Solt is the mayor of Arven.", "stands in the question already"),
        ("Was Mira Solt elected mayor?", "Elected mayor", "stands in the question already"),
        ("Did the rival win?", "No", 'only "No"'),
        ("Did penguins dance on the roof?", "Yes", "whose words are not in the text"),
        ("According to the article, who won?", "Mira Solt", 'says "According to the article"'),
        ("Who is named in this passage?", "Mira Solt", 'says "this passage"'),
        ("What does the report say on the harbour?", "It will reopen.", 'says "does the report"'),
        ("Who won?", "The text names Mira Solt.", 'answer says "The text"'),
        ("Why did she win?", "The reason is not mentioned.", "says that it is not known"),
        ("Why did she win?", "Unknown.", "says that it is not known"),
        ("Why did she win?", "The vote doesn't specify the reason", "says that it is not known"),
        ("Who won <image>?", "Mira Solt", "the mark '<image>'"),
        ("Who won?", "Mira Solt <|im_end|>", "the mark '<|im_end|>'"),
        ("???", "Mira Solt", "asks nothing"),
        ("Who won?", "...", "the answer is empty"),
        ("Who won?", "The one.", "the answer says nothing"),
        ("Who won?", "Mira Solt " * (ANSWER_WORDS_AT_MOST // 2 + 1), f"at most {ANSWER_WORDS_AT_MOST} are wanted"),
        ("Who won " + "the vote " * 20 + "?", "Mira Solt", "the question has 43 words, at most 40"),
    ],
)
def test_what_is_not_accepted_says_why(question, answer, reason):
    accepted, reasons = dialogue((question, answer), ("How many clinics are planned?", "25 clinics."))
    assert [entry.answer for entry in accepted.rounds] == ["25 clinics."]
    (sentence,) = reasons
    assert sentence.startswith("Round 1: ") and sentence.endswith(".")
    assert reason in sentence


def test_a_source_that_is_what_the_text_is_about_may_be_named():
    item = KnowledgeItem("r", "news", "science", "The report", "The climate report warns of floods.")
    given = Dialogue(rounds=[Round(question="What does the report warn of?", answer="It warns of floods.")])
    assert check_dialogue(item, given) == (given, [])
    item = KnowledgeItem("r", "news", "law", "The article", "The article forbids fishing.")
    for question, accepted in (
        ("What does the article forbid?", True),
        ("What, according to the article, ends?", False),
    ):
        given = Dialogue(rounds=[Round(question=question, answer="Fishing.")])
        assert (check_dialogue(item, given)[0] is not None) is accepted


def test_what_the_text_calls_unknown_may_be_called_so():
    item = KnowledgeItem("u", "news", "crime", "A theft", "The thief is unknown. The motive was not disclosed.")
    pairs = [("Who is the thief?", "Unknown."), ("Which motive was there?", "It was not disclosed.")]
    given = Dialogue(rounds=[Round(question=question, answer=answer) for question, answer in pairs])
    assert check_dialogue(item, given) == (given, [])


def test_questions_are_asked_once():
    pairs = [
        ("How many clinics are planned?", "25 clinics."),
        ("how many CLINICS are planned", "twenty-five"),
        ("How many clinics are being planned?", "25"),
        ("Who won?", "Mira Solt"),
    ]
    accepted, reasons = dialogue(*pairs, seen=["Who won?"])
    assert [entry.question for entry in accepted.rounds] == ["How many clinics are planned?"]
    assert [reason.split(":")[0] for reason in reasons] == ["Round 2", "Round 3", "Round 4"]
    assert all("asked already" in reason for reason in reasons)


def test_nothing_accepted_is_none():
    assert dialogue(("Who won?", "Anna Berg"))[0] is None


def test_a_long_title_does_not_make_two_questions_one():
    title = "Solt wins the long and unexpectedly close election for the office of mayor of the old harbour town"
    item = KnowledgeItem("x", "news", "politics", title, f"{TEXT} The place was Brest.")
    when = Round(question=f'On what date did the event "{title}" take place?', answer="5 March 2024")
    where = Round(question=f'What was the place of the event "{title}"?', answer="Brest")
    accepted, reasons = check_dialogue(item, Dialogue(rounds=[when, where, when]))
    assert [each.answer for each in accepted.rounds] == ["5 March 2024", "Brest"]
    assert len(reasons) == 1 and "asked already" in reasons[0]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Who founded Arven?", "Who was the one that founded Arven?", True),
        ("When was Arven founded?", "Where was Arven founded?", False),
        ("What did the party win in 2010?", "What did the party win in 2014?", False),
        ("Who is mayor of Arven?", "Who is mayor of Bellin?", False),
        ("Who is the mayor?", "Who is the rival?", False),
        ("What is the date of birth of this great writer?", "What is the date of death of this great writer?", False),
        ("How many clinics did the council support?", "How many clinics has the council supported?", True),
        ("Which river does the bridge cross?", "Which river does the old bridge cross near town?", False),
        ("谁是市长?", "谁是市长", True),
        ("谁是市长?", "谁是对手?", False),
    ],
)
def test_what_is_the_same_question(first, second, same):
    assert same_question(first, second) is same is same_question(second, first)


# But for the number that is one with the word behind it.
WORDS = st.sampled_from([word for word in TEXT.split() if word != "$2.5" and word != "million."])


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=8))
def test_words_of_the_text_are_supported_however_they_are_written(words):
    answer = " ".join(words)
    for form in (answer, answer.upper(), f"  {answer} !"):
        assert supported(TEXT, form) == 1.0


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(WORDS, max_size=8), strange=st.lists(st.sampled_from(["zyx", "qqq", "77"]), min_size=1, max_size=4)
)
def test_words_that_are_not_in_the_text_lower_the_share(words, strange):
    known, both = " ".join(words), " ".join([*words, ".", *strange])
    assert 0.0 <= supported(TEXT, both) < 1.0
    assert supported(TEXT, " ".join(strange)) == 0.0
    assert supported(TEXT, known or "Yes") == 1.0


@settings(max_examples=60, deadline=None)
@given(first=st.text(max_size=40), second=st.text(max_size=40))
def test_any_text_can_be_judged(first, second):
    assert 0.0 <= supported(first, second) <= 1.0
    assert same_question(first, second) == same_question(second, first)
    assert same_question(first, first)
    assert word_count(first) >= 0
    question = Questions(
        questions=[Quadruplet.model_construct(question=first, answer=second, subject=second, hypernym=first)]
    )
    for accepted, reasons in (
        check_dialogue(ITEM, Dialogue(rounds=(Round.model_construct(question=first, answer=second),))),
        check_questions(ITEM, question),
        check_caption(ITEM, Caption.model_construct(depicted=first, summary=second)),
    ):
        assert (accepted is None) == bool(reasons)


@settings(max_examples=100, deadline=None)
@given(value=st.integers(0, 10**9), digits=st.integers(0, 99))
def test_a_number_is_one_however_it_is_grouped(value, digits):
    for text in (f"{value:,}", str(value), f"{value:,}".replace(",", " ")):
        assert [token.key for token in tokenize(text)] == [str(value)]
    assert tokenize(f"{value}.{digits:02d}")[0].key == tokenize(f"{value},{digits:02d}")[0].key
    assert (tokenize(f"{value}.{digits:02d}")[0].key == str(value)) is (digits == 0)


def test_numbers_are_read_in_words_and_with_scales():
    def keys(text):
        return [token.key for token in tokenize(text)]

    assert keys("2.5 million") == keys("$2,500,000")[1:] == keys("2.5m") == ["2500000"]
    assert keys("ninety nine") == keys("ninety-nine") == ["99"]
    assert keys("three thousand") == ["3000"] and keys("a hundred")[-1:] == ["100"]
    assert keys("1st") == ["1"] and keys("1990s") == ["1990s"] and keys("3,5") == keys("3.5") == ["3.5"]
    assert keys("Sept") == ["september"] and keys("the U.S.")[1] == "us"


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ("clinic", "clinics", True),
        ("founded", "founder", True),
        ("country", "countries", True),
        ("build", "building", True),
        ("president", "presented", False),
        ("austria", "australia", False),
        ("marine", "market", False),
        ("iran", "iraq", False),
    ],
)
def test_forms_of_one_word(first, second, match):
    assert stem_match(first, second) is match is stem_match(second, first)


def test_words_are_counted_in_scripts_without_spaces():
    assert word_count("Mira Solt won.") == 3
    assert word_count("米拉当选市长") == 3


def test_a_caption_is_judged_in_both_parts():
    good = Caption(depicted="Mira Solt", summary="Mira Solt was elected mayor of Arven on 5 March 2024.")
    assert check_caption(ITEM, good) == (good, [])
    full = "Mira Solt was elected mayor of Arven with 61.5 percent of the vote on 5 March 2024 and the harbour of Arven"
    assert word_count(full) == SUMMARY_WORDS_AT_MOST - 3
    for more, fits in (("will reopen late", True), ("will reopen late too", False)):
        assert (check_caption(ITEM, good.model_copy(update={"summary": f"{full} {more}"}))[0] is not None) is fits
    bad = {
        "depicted": [
            ("Anna Berg", "What is depicted.*Anna"),
            ("a mayor " * 9, "at most 15 are wanted"),
            ("?", "empty"),
        ],
        "summary": [
            ("Mira Solt was elected " * 7, f"at most {SUMMARY_WORDS_AT_MOST} are wanted"),
            ("Mira Solt won in 2025.", '"2025"'),
            ("Some villagers quarrelled about breakfast.", "only 0% of its content words"),
            ("The article tells of Mira Solt.", 'says "The article"'),
            ("The winner is not specified.", "not known"),
        ],
    }
    for name, cases in bad.items():
        for text, reason in cases:
            accepted, reasons = check_caption(ITEM, good.model_copy(update={name: text}))
            assert accepted is None and re.search(reason, " ".join(reasons)), (text, reasons)
    assert check_caption(ITEM, good, seen=[good.summary.upper()])[1] == ["The summary was given already."]


def quadruplet(**changes):
    usual = dict(
        question="Which city elected Mira Solt as mayor?", answer="Arven", subject="Mira Solt", hypernym="politician"
    )
    return Quadruplet(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        (dict(subject="mira solt"), None),
        (dict(question="Which city elected her as mayor?"), "does not hold the subject"),
        (dict(question="Which city elected Mira Solter as mayor?"), "does not hold the subject"),
        (dict(question="Which city elected Anna as mayor?", subject="Anna"), 'subject "Anna" is not in the text'),
        (dict(answer="Bellin"), '"Bellin"'),
        (dict(answer="The small town of Arven by the sea there"), "9 words, at most 6"),
        (dict(answer="Arven harbour breakfast"), '"breakfast"'),
        (dict(answer="Mira Solt"), "stands in the question already"),
        (dict(answer="mayor"), "stands in the question already"),
        (dict(hypernym="person living in Arven"), "gives the answer away"),
        (dict(hypernym="Mira Solt"), "the subject itself"),
        (dict(hypernym="a very important person of note"), "at most 4"),
        (dict(hypernym="the"), "hypernym is empty"),
    ],
)
def test_quadruplets(changes, reason):
    other = quadruplet(question="Who was the rival of Mira Solt?", answer="Pavel Černý")
    accepted, reasons = check_questions(ITEM, Questions(questions=[quadruplet(**changes), other]))
    assert other in accepted.questions
    if reason is None:
        assert reasons == [] and len(accepted.questions) == 2
    else:
        assert len(accepted.questions) == 1 and reason in reasons[0] and reasons[0].startswith("Question 1: ")


def test_quadruplets_are_asked_once():
    accepted, reasons = check_questions(ITEM, Questions(questions=[quadruplet(), quadruplet()]), seen=())
    assert len(accepted.questions) == 1 and "asked already" in reasons[0]


def test_a_phrase_is_held_as_whole_words():
    assert holds("Where was Mira Solt (mayor) born?", "mira solt") and holds("Is C++ old?", "C++")
    assert not holds("Where was Mira Solter born?", "Mira Solt") and not holds("Where?", " ")
