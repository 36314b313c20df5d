"""Words, numbers and names of a text in a form in which two ways of writing the same thing are equal."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache


def _words(text: str) -> list[str]:
    return text.split()


FUNCTION_WORDS = frozenset(
    _words("""
    a an the this that these those it its it's he him his she her hers they them their theirs we us our ours i me
    my mine you your yours who whom whose which what when where why how there here and or but nor so yet if then
    than as of in on at by for from with without within into onto upon about above after again against along among
    around before behind below between beyond during except inside near off out outside over past per since through
    throughout till to toward towards under until up via while because although though however therefore thus is
    are was were be been being am do does did doing done has have had having can could may might must shall should
    will would not no yes also too very more most less least much many few some any all both each every either
    neither other others another such same own only just even still already ever never now once one ones s t d ll
    re ve m according additionally moreover furthermore meanwhile later earlier today overall instead finally
    despite unlike like amid among alongside due thanks several various numerous people someone somebody something
    everyone everything nobody nothing whether unless
    """)
)
QUESTION_WORDS = frozenset(_words("who whom whose which what when where why how"))
FORMS_OF_ADDRESS = frozenset(_words("mr mrs ms miss mx mister dr doctor prof professor sir madam lord lady saint st"))
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_SMALL += " seventeen eighteen nineteen"
_VALUES = {word: value for value, word in enumerate(_SMALL.split())}
_TENS = {
    word: 10 * value
    for value, word in enumerate(_words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)
}
_ORDINALS = {
    word: value
    for value, word in enumerate(_words("first second third fourth fifth sixth seventh eighth ninth tenth"), start=1)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT_SCALES = {"k": "thousand", "m": "million", "mn": "million", "bn": "billion", "b": "billion", "tn": "trillion"}
_MONTHS = _words("january february march april may june july august september october november december")
_ALIASES = {month[:3]: month for month in _MONTHS} | {"sept": "september"}
_SYMBOLS = {"%": " percent ", "$": " dollar ", "€": " euro ", "£": " pound ", "&": " and ", "°": " degree "}

# Scripts that are written without spaces: each character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\U00020000-\U0003ffff"
_TOKEN = re.compile(
    rf"(?P<number>\d+(?:[.,  ]\d{{3}}(?!\d))+(?:[.,]\d+)?|\d+(?:[.,]\d+)?)(?P<suffix>[^\W\d_]*)"
    rf"|(?P<dotted>(?:[^\W\d_]\.){{2,}})|(?P<unspaced>[{_UNSPACED}])|(?P<word>(?:(?![{_UNSPACED}])[^\W_])+)"
    r"|(?P<end>[.!?:;\n])"
)


@dataclass(frozen=True)
class Token:
    """One word of a text.

    Attributes:
        key: The normalised form; numbers as plain decimals.
        shown: As it is written.
        number: Whether it is a number.
        capital: Whether it is written with a capital letter.
        initial: Whether it begins a sentence.
        upper: Whether all of its letters, two at least, are capital.
    """

    key: str
    shown: str
    number: bool = False
    capital: bool = False
    initial: bool = False
    upper: bool = False

    @property
    def content(self) -> bool:
        """Whether it says something: a number, an acronym, or a word that is neither a function word nor, as in
        "Dr. Solt", a form of address."""
        if self.key in FUNCTION_WORDS:
            return self.upper and self.key not in ("yes", "no")
        return self.number or not (self.capital and self.key in FORMS_OF_ADDRESS)


def fold(text: str) -> str:
    """Without case, accents and typographic variants."""
    if text.isascii():
        return text.casefold()
    decomposed = unicodedata.normalize("NFKD", text.replace("’", "'").replace("ß", "ss"))
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


def _decimal(text: str) -> Decimal:
    groups = re.split(r"[.,  ]", text)
    if len(groups) > 1 and all(len(group) == 3 for group in groups[1:]) and groups[0] != "0":
        return Decimal("".join(groups))
    marks = re.findall(r"[.,  ]", text)
    if len(marks) > 1:
        return Decimal("".join(groups[:-1]) + "." + groups[-1])
    return Decimal(text.replace(",", "."))


def _plain(value: Decimal) -> str:
    text = format(value, "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def _raw(text: str) -> list[Token]:
    for symbol, word in _SYMBOLS.items():
        text = text.replace(symbol, word)
    text = re.sub(r"['’]s\b", "", unicodedata.normalize("NFKC", text))
    text = re.sub(r"\bper cent\b", "percent", text, flags=re.IGNORECASE)
    tokens: list[Token] = []
    initial = True
    for match in _TOKEN.finditer(text):
        if match["end"]:
            # A mark that is followed by a small letter ends an abbreviation, not a sentence.
            rest = text[match.end() :].lstrip()
            initial = match["end"] != "." or not rest[:1].islower()
            continue
        shown = match[0]
        if match["number"]:
            tokens.append(Token(_plain(_decimal(match["number"])), shown, number=True, initial=initial))
            suffix = fold(match["suffix"])
            if suffix in _SHORT_SCALES:
                tokens.append(Token(_SHORT_SCALES[suffix], suffix))
            elif suffix == "s":
                tokens[-1] = Token(tokens[-1].key + "s", shown, number=True, initial=initial)
            elif suffix and suffix not in ("st", "nd", "rd", "th"):
                tokens.append(Token(suffix, match["suffix"], capital=match["suffix"][0].isupper()))
        else:
            letters = shown.replace(".", "")
            key = fold(letters)
            if match["dotted"] or not (letters.isupper() and len(letters) > 1):
                key = _ALIASES.get(key, key) if shown[0].isupper() else key
            upper = letters.isupper() and len(letters) > 1
            tokens.append(Token(key, shown, capital=letters[0].isupper(), initial=initial, upper=upper))
        initial = False
    return tokens


@lru_cache(maxsize=1024)
def tokenize(text: str) -> tuple[Token, ...]:
    """The words of a text, numbers in words and digits alike (``2.5 million``, ``2,500,000`` and ``2.5m`` are one)."""
    result: list[Token] = []
    for token in _raw(text):
        last = result[-1] if result else None
        if not token.number and token.key in _TENS | _VALUES and token.key != "one":
            token = Token(str((_TENS | _VALUES)[token.key]), token.shown, number=True, initial=token.initial)
        if last is not None and last.number and token.key in _SCALES and last.key.replace(".", "").isdigit():
            value = _plain(Decimal(last.key) * _SCALES[token.key])
            result[-1] = Token(value, f"{last.shown} {token.shown}", number=True, initial=last.initial)
        elif last is not None and fold(last.shown) in _TENS and (unit := _unit(token)):
            result[-1] = Token(
                str(int(last.key) + unit), f"{last.shown}-{token.shown}", number=True, initial=last.initial
            )
        elif token.key in _SCALES and last is not None and last.key in ("a", "one"):
            result[-1] = Token(str(_SCALES[token.key]), f"{last.shown} {token.shown}", True, initial=last.initial)
        else:
            result.append(token)
    return tuple(result)


def _unit(token: Token) -> int:
    """1 to 9 for a digit's name, else 0."""
    value = _VALUES.get(fold(token.shown), 0)
    return value if value < 10 else 0


_ENGLISH = frozenset(
    _words(
        "the of and is are by to it its he she they his been that who which what when where how why did does has with"
    )
)


def english(text: str) -> bool:
    """Whether one in twelve of a text's words, and one at least, is a common word of English and of English alone."""
    tokens = tokenize(text)
    return sum(token.key in _ENGLISH for token in tokens) >= max(1, len(tokens) / 12)


def ordinal(key: str) -> str | None:
    """The number of a word such as ``third``, or None."""
    return str(_ORDINALS[key]) if key in _ORDINALS else None


def word_count(text: str) -> int:
    """Words between spaces; in scripts without spaces two characters count as one word."""
    unspaced = len(re.findall(rf"[{_UNSPACED}]", text))
    return len(re.sub(rf"[{_UNSPACED}]", " ", text).split()) + (unspaced + 1) // 2


def stem_match(first: str, second: str) -> bool:
    """Whether two words are forms of one: equal, or alike in their first letters but for a short ending."""
    if first == second:
        return True
    shorter, longer = sorted((len(first), len(second)))
    common = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        common += 1
    return common >= 4 and shorter - common <= 3 and longer - common <= 4 and common >= 0.6 * longer
