"""Words, numbers and names of a text in a form in which two ways of writing the same thing are equal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
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
    everyone everything nobody nothing whether unless cannot
    """)
)
# The commonest small words of other languages, folded: which of them a text has tells its language.
_SMALL_WORDS = {
    language: frozenset(_words(words))
    for language, words in {
        "German": "der die das den dem des ein eine einen einem einer eines und oder ist sind war waren wird wurde "
        "wurden er sie es ihr ihre sein seine zu zum zur von vom im am an in auf bei mit nach aus fur als auch sich "
        "nicht hat hatte haben uber dass wie so nur noch",
        "French": "le la les l un une des du de d et ou est sont etait fut a au aux il elle ils elles on se s sa son "
        "ses ce cet cette qui que qu en dans par pour sur avec ne pas n y plus",
        "Spanish": "el la los las un una unos unas y o es son fue era de del al en que se su sus por para con no lo "
        "como mas ha han",
        "Italian": "il lo la i gli le un una e o di del della dei da dal in nel nella che si per con non sono fu era "
        "al alla ha suo sua",
        "Portuguese": "o a os as um uma e ou de do da dos das em no na nos nas que se por para com nao foi era ao sua "
        "seu",
        "Dutch": "de het een en of is zijn was werd van in op te dat die met voor door aan bij er hij zij niet ook",
        "Russian": "и в во на с со не по из к у о об от до за он она оно они его ее их что это как был была было были "
        "а но же для при",
        "Arabic": "في من على الى عن مع هو هي هذا هذه ان كان كانت و التي الذي ما لا",
    }.items()
}
NEGATIONS = frozenset(
    _words("""
    not never no none nor neither without cannot nicht kein keine keinen keinem keiner keines nie niemals ohne ne n
    jamais nunca nao не нет никогда ليس ليست لم لن 不 没 沒 未 无 無
    """)
)
QUESTION_WORDS = frozenset(
    _words("""
    who whom whose which what when where why how wer wen wem wessen wann wo wohin woher warum wie welche welcher
    welches welchen welchem wieviel qui quand ou quoi quel quelle quels quelles comment pourquoi combien quien quienes
    cuando donde cual cuales como cuanto cuanta cuantos cuantas кто когда где куда какои какая какое какие сколько
    почему как من متى اين كم كيف لماذا ماذا
    """)
)
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
UNITS = {
    name: names.split()[0]
    for names in (
        "metre metres meter meters metern m metro metros metri метр метра метров",
        "kilometre kilometres kilometer kilometers kilometern km kilometro kilometros километр километра километров",
        "centimetre centimetres centimeter centimeters cm", "millimetre millimetres millimeter millimeters mm",
        "foot feet ft pied pieds fuss", "mile miles mi", "inch inches", "yard yards yd",
        "kilogram kilograms kilogramm kilogrammes kg", "gram grams gramm grammes g", "tonne tonnes ton tons tonnen t",
        "litre litres liter liters", "hectare hectares ha", "acre acres",
        "second seconds sec", "minute minutes min minuten", "hour hours h stunde stunden heure heures hora horas",
        "day days tag tage tagen jour jours dia dias", "week weeks", "month months monat monate monaten",
        "year years jahr jahre jahren annee annees ans ano anos", "century centuries", "decade decades",
        "percent prozent pourcent", "degree degrees grad", "dollar dollars dolar dolares usd", "euro euros eur",
        "pound pounds gbp livre livres", "yen", "mark", "franc francs franken", "rupee rupees", "yuan",
    )
    for name in names.split()
}  # fmt: skip
_SYMBOLS = {"%": " percent ", "$": " dollar ", "€": " euro ", "£": " pound ", "&": " and ", "°": " degree "}

_CURRENCIES = ("dollar", "euro", "pound")

# Scripts that are written without spaces: each character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\U00020000-\U0003ffff"
_TOKEN = re.compile(
    rf"(?P<number>\d+(?:[.,  ]\d{{3}}(?!\d))+(?:[.,]\d+)?|\d+(?:[.,]\d+)?)(?P<suffix>(?:(?![{_UNSPACED}])[^\W\d_])*)"
    rf"|(?P<dotted>(?:[^\W\d_]\.){{2,}})|(?P<unspaced>[{_UNSPACED}]+)|(?P<word>(?:(?![{_UNSPACED}])[^\W_])+)"
    r"|(?P<end>[.!?:;\n])"
)


_SYMBOL = re.compile("[" + "".join(map(re.escape, _SYMBOLS)) + "]")
_POSSESSIVE = re.compile(r"['’]s\b")
_PER_CENT = re.compile(r"\bper cent\b", re.IGNORECASE)
_NOT = re.compile(r"\b(\w+?)n['’]t\b", re.IGNORECASE)
_FULL = {"ca": "can", "wo": "will", "sha": "shall"}
_ARABIC_ARTICLE = re.compile("^(?:[وف]?(?:ال|بال|كال|لل))(?=\\w{3})")


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
        near: Of a character of a script without spaces, it with the one before and with the one behind.
    """

    key: str
    shown: str
    number: bool = False
    capital: bool = False
    initial: bool = False
    upper: bool = False
    near: tuple[str, ...] = ()

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
    text = unicodedata.normalize("NFKC", _SYMBOL.sub(lambda match: _SYMBOLS[match[0]], text))
    if "'" in text or "’" in text:
        text = _NOT.sub(lambda match: f"{_FULL.get(match[1].lower(), match[1])} not", _POSSESSIVE.sub("", text))
    text = _PER_CENT.sub("percent", text)
    tokens: list[Token] = []
    initial = True
    for match in _TOKEN.finditer(text):
        if match["end"]:
            # A mark that is followed by a small letter ends an abbreviation, not a sentence.
            rest = text[match.end() :].lstrip()
            initial = match["end"] != "." or not rest[:1].islower()
            continue
        shown = match[0]
        if match["unspaced"]:
            run = fold(shown)
            pairs = [run[i : i + 2] for i in range(len(run) - 1)]
            tokens += [
                Token(char, char, near=tuple(pairs[max(i - 1, 0) : i + 1]), initial=initial and i == 0)
                for i, char in enumerate(run)
            ]
        elif match["number"]:
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
            key = _ARABIC_ARTICLE.sub("", fold(letters))
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


@lru_cache(maxsize=256)
def small_words(text: str) -> frozenset[str]:
    """The small words of the language of a text, where that is another than English; else none.

    It is the language with most small words in the text, if they are an eighth of all words.
    """
    if english(text):
        return frozenset()
    keys = [token.key for token in tokenize(text)]
    found = {language: sum(key in words for key in keys) for language, words in _SMALL_WORDS.items()}
    most = max(found, key=lambda language: found[language])
    return _SMALL_WORDS[most] if found[most] and 8 * found[most] >= len(keys) else frozenset()


def units(tokens: tuple[Token, ...]) -> Iterator[tuple[Token, str]]:
    """The numbers that have a unit behind them, or a currency before them, with its name."""
    for index, token in enumerate(tokens):
        if token.number:
            before = tokens[index - 1].shown.strip() if index else ""
            after = tokens[index + 1].key if index + 1 < len(tokens) else ""
            if after in UNITS:
                yield token, UNITS[after]
            elif before in _CURRENCIES:
                yield token, before


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
