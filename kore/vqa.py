"""Text as the scorer of VQA compares it (Antol et al. 2015), which EVOKE's cover exact match uses.

The rules are those of the scorer published with the VQA data; punctuation outside ASCII is treated as its marks are.
"""

from __future__ import annotations

import re
import unicodedata

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody's someone's something's
that'd that's there'd there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all you'd you'd've you'll you're you've
"""
_WITH_APOSTROPHE = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}


def normalize_vqa(text: str, plain: bool = False) -> str:
    """Lower case, numbers to ten as digits, no articles, apostrophes put into contractions, and no punctuation.

    A mark that stands beside a space anywhere in the text is deleted, another becomes a space, so "red/blue" is two
    words; in a text with a number such as 10,000 all are deleted. Periods stay before digits; apostrophes, colons and
    signs such as % and $ stay. ``plain`` leaves characters outside ASCII as they are, as the published scorer does.
    """
    if not plain:
        text = text.replace("’", "'").replace("‘", "'")
    text = " ".join(text.split())
    deletes = _THOUSANDS.search(text) is not None
    result = text
    for mark in {character for character in text if character in _MARKS or (not plain and _is_punctuation(character))}:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deletes or beside_space else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", result).lower().split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def cover_match_of_evoke(prediction: str, answer: str) -> bool:
    """The cover match that EVOKE's published numbers were made with, to the letter.

    A word boundary must stand at both ends, so an answer that begins or ends in a sign is never found ("20%"), and an
    answer that the normalisation erases is found in any text with a word.
    """
    said, expected = normalize_vqa(prediction, plain=True), normalize_vqa(answer, plain=True)
    return re.search(rf"\b{re.escape(expected)}\b", said) is not None


def _is_punctuation(character: str) -> bool:
    return ord(character) > 127 and unicodedata.category(character).startswith("P")
