"""Metrics against hand-worked cases and the paper's own rows."""

from __future__ import annotations

import itertools
import math

import pytest

from kore import metrics
from tests.paper_tables import FAMILIES

# Paper arXiv 2510.19316, LLaVA-1.5 7B: untouched, then K.A and K.R of two methods.
UNTOUCHED = (7.12, 46.74)
PAPER_ROWS = {"LoRA": (16.77, 33.47), "KORE": (35.96, 40.00)}
PRINTED = [(row, family[0]) for family in FAMILIES for row in family[1:]]
NAMES = [row.name for row, _ in PRINTED]


@pytest.mark.parametrize(("row", "untouched"), PRINTED, ids=NAMES)
def test_the_measures_give_every_row_of_the_paper(row, untouched):
    """From the marks as printed, which the paper's own numbers, made of unrounded ones, may miss by their rounding."""
    ka, ka0 = (metrics.knowledge_adaptation(one.cem, one.f1) for one in (row, untouched))
    kr, kr0 = row.retention, untouched.retention
    assert ka == pytest.approx(row.ka, abs=0.0101) and kr == pytest.approx(row.kr, abs=0.0101)
    assert metrics.average(ka, kr) == pytest.approx(row.avg, abs=0.0151)
    assert metrics.hars(ka, kr, ka0, kr0) == pytest.approx(row.hars, abs=0.01)
    assert metrics.knowledge_retention(untouched.benchmarks) == pytest.approx(untouched.kr, abs=0.0101)


@pytest.mark.parametrize(("row", "untouched"), PRINTED, ids=NAMES)
def test_hars_of_the_rounded_numbers_is_the_printed_one_to_rounding(row, untouched):
    """What is printed lies among the values over all numbers that round to the printed K.A and K.R."""
    corners = itertools.product(*((x - 0.005, x + 0.005) for x in (row.ka, row.kr, untouched.ka, untouched.kr)))
    values = [metrics.hars(*corner) for corner in corners]
    assert min(values) - 0.005 <= row.hars <= max(values) + 0.005
    assert metrics.hars(row.ka, row.kr, untouched.ka, untouched.kr) == pytest.approx(row.hars, abs=0.15)


@pytest.mark.parametrize("row", PAPER_ROWS)
def test_hars_equals_its_definition_and_ignores_the_unit(row):
    ka, kr = PAPER_ROWS[row]
    ka0, kr0 = UNTOUCHED
    gain_a, gain_r = 100 * (ka - ka0) / ka0, 100 * (kr - kr0) / kr0
    f_a, f_r = 100 * gain_a / (gain_a + 100), gain_r + 100
    expected = 2 / (1 / f_a + 1 / f_r)
    assert metrics.hars(ka, kr, ka0, kr0) == pytest.approx(expected, rel=1e-12)
    assert metrics.hars(ka / 100, kr / 100, ka0 / 100, kr0 / 100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((7.12, 46.74, 7.12, 46.74), 0.0),  # nothing learned
        ((5.0, 46.74, 7.12, 46.74), 0.0),  # less than nothing
        ((0.0, 50.0, 0.0, 50.0), 0.0),
        ((50.0, 0.0, 10.0, 50.0), 0.0),  # all forgotten
        ((50.0, 50.0, 0.0, 50.0), 100.0),  # nothing known before, nothing lost
        ((20.0, 0.0, 10.0, 0.0), 2 / (1 / 50 + 1 / 100)),  # nothing to forget
        ((20.0, 60.0, 10.0, 50.0), 2 / (1 / 50 + 1 / 120)),  # retention may gain
    ],
)
def test_hars_where_the_formula_has_no_value(scores, expected):
    assert metrics.hars(*scores) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_hars_refuses_impossible_scores(bad):
    with pytest.raises(ValueError, match="hars: kr: expected a score of 0 or more"):
        metrics.hars(1.0, bad, 1.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Eiffel Tower, in Paris.", "eiffel tower", 1),
        ("the tower eiffel", "eiffel tower", 0),
        ("nineteen", "nine", 0),
        ("He has nine.", "Nine", 1),
        ("", "nine", 0),
        ("It is a “Kestrel”", "kestrel", 1),
        ("Answer: A", "A", 1),
        ("Answer: B", "A", 0),
        ("a kestrel", "B", 0),
        ("about 20 %", "%", 1),
        ("about 20", "%", 0),
        ("no idea", ["yes", "no"], 1),
        ("首都是北京。", "北京", 1),
        ("首都是南京。", "北京", 0),
    ],
)
@pytest.mark.parametrize("normalization", ["vqa", "squad"])
def test_cover_exact_match(prediction, answer, expected, normalization):
    assert metrics.cover_exact_match(prediction, answer, normalization) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "vqa", "squad"),
    [
        ("He has 9.", "nine", 1, 0),  # numbers to ten
        ("It is the kestrel's nest", "kestrel", 1, 0),  # apostrophes stay, and end a word
        ("red/blue", "blue", 1, 0),  # a mark between letters parts words
        ("a well-known man", "well known", 1, 0),
        ("It costs 10,000 (about).", "10000", 1, 1),
        ("3.5", "35", 0, 1),  # a decimal point stays
        ("He said: dont go", "don't", 1, 1),
        ("20%", "%", 1, 0),  # no word, so nothing need part it
        ("eighteen", "eight", 0, 0),
        ("It’s blue", "it's blue", 1, 1),
        ("red；blue", "blue", 1, 0),
        ("ten of them", "10", 1, 0),
    ],
)
def test_the_two_normalisations_of_cover_exact_match(prediction, answer, vqa, squad):
    assert metrics.cover_exact_match(prediction, answer) == metrics.cover_exact_match(prediction, answer, "vqa") == vqa
    assert metrics.cover_exact_match(prediction, answer, "squad") == squad


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S. Army, Inc.", "us army inc"),
        ("version 3.5", "version 3.5"),
        ("state-of-the-art", "state of art"),
        ("- a dash - here", "dash here"),
        ("one/two 1,000", "onetwo 1000"),
        ("None of  the\nTHREE", "0 of 3"),
        ("youve  isnt o'clock", "you've isn't o'clock"),
        ("time: 3 o'clock", "time: 3 o'clock"),
    ],
)
def test_vqa_normalisation(text, expected):
    from kore.vqa import normalize_vqa

    assert normalize_vqa(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "evoke", "vqa"),
    [
        ("ten feet", "10", 1, 1),
        ("nineteen", "nine", 0, 0),
        ("Spider-Man, hero", "Spider-Man", 1, 1),
        ("New-York", "New York", 1, 1),
        ("U.S.", "US", 1, 1),
        ("none of them", "0", 1, 1),
        ("20%", "20%", 0, 1),
        ("$419,300", "$419,300", 0, 1),
        ("419300", "419,300", 1, 1),
        ("'ten foot tall'", "'ten foot tall'", 0, 1),
        ("cat", "A", 1, 0),
        ("", "The", 0, 0),
        ("Oregon and New Mexico", "Oregon New Mexico", 0, 0),
        ("Superman's cape", "Superman", 1, 1),
        ("twenty", "20", 0, 0),
        ("首都是北京", "北京", 0, 1),
    ],
)
def test_the_rule_of_evoke_has_the_faults_of_its_scorer(prediction, answer, evoke, vqa):
    assert metrics.cover_exact_match(prediction, answer, "evoke") == evoke
    assert metrics.cover_exact_match(prediction, answer, "vqa") == vqa


def test_f1_of_sets_counts_a_word_once():
    assert metrics.f1("cat cat cat", "cat", "set") == 1.0 and metrics.f1("cat cat cat", "cat") == 0.5
    assert metrics.f1("new york new", "york new york", "set") == 1.0
    assert metrics.f1("new york new", "york new york") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="kind: expected multiset or set, got 'bag'"):
        metrics.f1("a", "b", "bag")
    with pytest.raises(ValueError, match="normalization: expected vqa or squad"):
        metrics.cover_exact_match("a", "b", "none")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "cat sat down", 0.8),  # 2 common of 2 and 3
        ("cat cat", "cat", 2 / 3),  # bags: the second cat earns nothing
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "cat", 0.0),
        ("A cat!", "cat", 1.0),
        ("red kite", ["kite", "red kite"], 1.0),
        ("C", "C", 1.0),
        ("A", "A", 1.0),
        ("北京", "北平", 0.5),
    ],
)
def test_f1(prediction, answer, expected):
    assert metrics.f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize("bad", ["", "  ", [], ["x", ""], [3]])
def test_an_answer_that_is_none_is_refused(bad):
    for measure in (metrics.cover_exact_match, metrics.f1):
        with pytest.raises(ValueError, match="answer: expected a non-empty string"):
            measure("x", bad)


def test_means():
    assert metrics.knowledge_adaptation(30.0, 40.0) == 35.0
    assert metrics.average(35.0, 45.0) == 40.0
    assert metrics.knowledge_retention({"a": 10.0, "b": 20.0}) == 15.0
    with pytest.raises(ValueError, match="at least one"):
        metrics.knowledge_retention([])
