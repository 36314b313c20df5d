"""Questions with answers, good and bad, in several languages: what the checks are measured on.

Each case: language of the text, whether a careful reader accepts it, question, answer, and "short" where it is a
visual question's. ``MISSED`` are bad ones that a comparison of words cannot find; they are there to be seen.
"""

from __future__ import annotations

import pytest

from kore.augmentation.checks import check_caption, check_dialogue, check_questions
from kore.augmentation.schema import Caption, Dialogue, Quadruplet, Questions, Round
from kore.augmentation.types import KnowledgeItem
from kore.augmentation.words import english, small_words

TEXTS = {
    "en": (
        "Arkady Bridge",
        "The Arkady Bridge is a cable-stayed bridge over the river Lenn. It was designed by Ingrid Solheim and opened "
        "on 3 May 2011. Its main span measures 412 metres, and it cost $2.5 million. The bridge is not open to "
        "trucks, but a tram line crosses it. It was paid for by the World Health Organization and the United Kingdom. "
        "Ben O'Connor won the first half-marathon on it in 2 hours.",
    ),
    "en lemur": (
        "Lemur",
        "The lemur does not eat red meat. It not only eats sweet nuts but sings. The Federal Bureau of Investigation "
        "counted nine of them. No other animal of the island climbs as high.",
    ),
    "de": (
        "Berliner Fernsehturm",
        "Der Berliner Fernsehturm ist mit 368 Metern das höchste Bauwerk Deutschlands. Er wurde am 3. Oktober 1969 "
        "eröffnet und steht am Alexanderplatz. Architekt war Hermann Henselmann. Der Bau kostete 132,5 Millionen Mark. "
        "Der Turm wird nicht beheizt.",
    ),
    "fr": (
        "Pont des Brumes",
        "Le pont des Brumes traverse l'Orle à Vernay. Il a été dessiné par l'ingénieure Éloïse Garnier et inauguré en "
        "1934. Sa longueur est de 1 250 mètres. Le pont n'est pas ouvert aux camions.",
    ),
    "es": (
        "Museo del Agua",
        "El Museo del Agua abrió sus puertas en Lugarnuevo el 8 de abril de 2015. La directora, Inés Peñalver, reunió "
        "más de 3.400 piezas. La entrada cuesta 6,50 euros y los niños no pagan.",
    ),
    "zh": (
        "青云大桥",
        "青云大桥位于江州市,横跨清水河,全长1,250米。大桥由李明远设计,2011年5月3日建成通车。大桥不对卡车开放。",
    ),
    "ja": (
        "白鳥灯台",
        "白鳥灯台は1902年に岬町に建てられた灯台である。高さは31メートルで、設計者は佐藤健一である。現在は使われていない。",
    ),
    "ar": (
        "برج الواحة",
        "يقع برج الواحة في مدينة نجمة ويبلغ ارتفاعه 210 أمتار. صممته المهندسة ليلى حداد وافتتح في عام 2008.",
    ),
    "ru": (
        "Северный маяк",
        "Северный маяк стоит на острове Гранитный. Его построил инженер Павел Ветров в 1887 году. Высота маяка "
        "составляет 42 метра. Маяк не работает с 1990 года.",
    ),
    "en lake": (
        "Lake Orrin",
        "Lake Orrin is a freshwater lake in the Kestrel Hills. It covers 38 square kilometres and is up to 95 m "
        "deep. No rivers flow out of it. In 1974 the Orrin Trust, led by Dr. Maud Fell, bought its eastern shore "
        "for £120,000. The trout that live there don't migrate. Swimming has been banned since the 2003 algae "
        "outbreak.",
    ),
    "de storm": (
        "Sturm über Holmstedt",
        "Ein Sturm hat am Dienstag in Holmstedt 14 Dächer beschädigt. Verletzt wurde niemand. Bürgermeisterin "
        "Karin Lotz schätzte den Schaden auf 800.000 Euro. Die Schulen bleiben bis Freitag geschlossen.",
    ),
    "zh museum": (
        "新馆开放",
        "海宁博物馆新馆于2024年9月1日开放,面积2.4万平方米。馆长陈静说,门票不收费。",
    ),
    "es market": (
        "Mercado de San Telmo",
        "El Mercado de San Telmo fue construido en 1897 por el arquitecto Juan Buschiazzo. Ocupa una manzana "
        "entera y tiene 150 puestos. No abre los lunes.",
    ),
    "ru bridge": (
        "Мост Ладья",
        "Мост Ладья открыли в 2016 году. Его длина 870 метров. Проект разработала Ольга Климова. По мосту не "
        "ходят трамваи.",
    ),
    "fr tower": (
        "Tour Morel",
        "La tour Morel mesure 96 mètres. Achevée en 1958, elle abrite 24 étages de bureaux. L'architecte était "
        "Henri Vasseur. Elle ne se visite pas.",
    ),
}

CASES = [
    # English: names, numbers, units, dates, abbreviations, hyphens, apostrophes, negation.
    ("en", True, "Who designed the bridge?", "It was designed by Ingrid Solheim."),
    ("en", True, "How long is the main span?", "It measures 412 m."),
    ("en", True, "How long is the main span?", "The main span is 412 meters long."),
    ("en", True, "When was it opened?", "On May 3, 2011."),
    ("en", True, "When was it opened?", "3rd of May 2011", "short"),
    ("en", True, "Who paid for it?", "The WHO and the UK paid for it."),
    ("en", True, "What did it cost?", "2,500,000 dollars"),
    ("en", True, "Is it open to trucks?", "No, it is not open to trucks."),
    ("en", True, "What crosses it besides cars?", "A tram line crosses the bridge."),
    ("en", True, "Who won the half marathon?", "Ben O’Connor", "short"),
    ("en", True, "What sort of bridge is it?", "A cable‑stayed bridge"),
    ("en", True, "Which river does it cross?", "Lenn", "short"),
    ("en", True, "Which vehicles may not cross it?", "Trucks, since the bridge is not open to them."),
    ("en", False, "Who designed the bridge?", "Ingrid Solberg designed the bridge."),
    ("en", False, "How long is the main span?", "The main span of the bridge measures 412 feet."),
    ("en", False, "How long is the main span?", "412 kilometres", "short"),
    ("en", False, "How long is the main span?", "421 metres", "short"),
    ("en", False, "What did it cost?", "The bridge cost 2.5 million euros."),
    ("en", False, "What did it cost?", "2.5 billion dollars"),
    ("en", False, "When was it opened?", "The bridge was opened on 3 June 2011."),
    ("en", False, "Is it open to trucks?", "The bridge is open to trucks."),
    ("en", False, "Does a tram cross it?", "A tram line doesn't cross the bridge."),
    ("en", False, "Who paid for it?", "The NATO paid for the bridge."),
    ("en", False, "Was it designed by Ingrid Solheim?", "It was designed by Ingrid Solheim."),
    ("en", False, "How fast was the winner?", "The winner took 2 days."),
    ("en", False, "Why was it built?", "It was built because the old ferry often sank in winter storms."),
    ("en lemur", True, "What does the lemur not eat?", "Red meat."),
    ("en lemur", True, "Which food is named first?", "Meat."),
    ("en lemur", True, "What does the lemur eat?", "It eats sweet nuts."),
    ("en lemur", True, "Who counted them?", "The FBI."),
    ("en lemur", True, "Which animal climbs high?", "The animal of the island climbs high."),
    ("en lemur", False, "What does the lemur eat?", "It eats red meat."),
    ("en lemur", False, "Who counted them?", "The FIB."),
    # German
    ("de", True, "Wie hoch ist der Turm?", "Er ist 368 Meter hoch."),
    ("de", True, "Wann wurde der Turm eröffnet?", "Am 3. Oktober 1969."),
    ("de", True, "Wer war der Architekt?", "Hermann Henselmann", "short"),
    ("de", True, "Was kostete der Bau?", "132,5 Millionen Mark"),
    ("de", True, "Wo steht der Turm?", "Der Turm steht am Alexanderplatz in Berlin."),
    ("de", True, "Was ist das höchste Bauwerk Deutschlands?", "Das höchste Bauwerk ist der Berliner Fernsehturm."),
    ("de", False, "Wer war der Architekt?", "Der Architekt war Walter Gropius."),
    ("de", False, "Wie hoch ist der Turm?", "Er ist 386 Meter hoch."),
    ("de", False, "Wo steht der Turm?", "Der Turm steht am Potsdamer Platz."),
    ("de", False, "Wird der Turm beheizt?", "Der Turm wird im Winter beheizt."),
    ("de", False, "Was kostete der Bau?", "Der Bau kostete 132,5 Millionen Euro."),
    # French
    ("fr", True, "Qui a dessiné le pont ?", "Le pont a été dessiné par Éloïse Garnier."),
    ("fr", True, "Qui a dessiné le pont ?", "Eloise Garnier", "short"),
    ("fr", True, "Quelle est la longueur du pont ?", "Elle est de 1250 mètres."),
    ("fr", True, "En quelle année le pont fut-il inauguré ?", "Il fut inauguré en 1934."),
    ("fr", False, "Qui a dessiné le pont ?", "Gustave Eiffel l'a dessiné."),
    ("fr", False, "En quelle année le pont fut-il inauguré ?", "1943", "short"),
    ("fr", False, "Le pont est-il ouvert aux camions ?", "Le pont est ouvert aux camions."),
    # Spanish
    ("es", True, "¿Quién es la directora?", "La directora es Inés Peñalver."),
    ("es", True, "¿Cuántas piezas reunió?", "3400", "short"),
    ("es", True, "¿Cuándo abrió el museo?", "Abrió el 8 de abril de 2015."),
    ("es", False, "¿Quién es la directora?", "La directora es Ana Torres."),
    ("es", False, "¿Cuánto cuesta la entrada?", "Cuesta 6,50 dólares."),
    ("es", False, "¿Dónde está el museo?", "El museo está en Sevilla."),
    # Chinese and Japanese: no spaces between words
    ("zh", True, "大桥是谁设计的?", "李明远", "short"),
    ("zh", True, "大桥是谁设计的?", "大桥是由李明远设计的。"),
    ("zh", True, "大桥有多长?", "全长1250米。"),
    ("zh", True, "大桥什么时候通车?", "2011年5月3日"),
    ("zh", True, "大桥横跨哪条河?", "清水河", "short"),
    ("zh", False, "大桥是谁设计的?", "王建国", "short"),
    ("zh", False, "大桥横跨哪条河?", "明水河", "short"),
    ("zh", False, "大桥在哪里?", "大桥在上海的黄浦江边。"),
    ("zh", False, "大桥什么时候通车?", "2012年5月3日"),
    ("zh", False, "大桥对卡车开放吗?", "大桥对卡车开放,没有限制。"),
    ("ja", True, "設計者は誰ですか?", "佐藤健一です。"),
    ("ja", True, "灯台はどこにありますか?", "岬町にあります。"),
    ("ja", True, "高さはどのくらいですか?", "31メートル", "short"),
    ("ja", False, "設計者は誰ですか?", "田中一郎です。"),
    ("ja", False, "灯台はどこにありますか?", "東京にあります。"),
    ("ja", False, "いつ建てられましたか?", "1920年に建てられました。"),
    # Arabic and Russian
    ("ar", True, "من صمم البرج؟", "صممته المهندسة ليلى حداد."),
    ("ar", True, "أين يقع البرج؟", "يقع البرج في المدينة نجمة."),
    ("ar", True, "كم يبلغ ارتفاع البرج؟", "يبلغ ارتفاعه ٢١٠ أمتار."),
    ("ar", True, "ما اسم المكان؟", "المدينة نجمة", "short"),
    ("ar", False, "من صمم البرج؟", "صممه المهندس سامي خليل."),
    ("ar", False, "متى افتتح البرج؟", "افتتح في عام 2018."),
    ("ru", True, "Кто построил маяк?", "Маяк построил Павел Ветров."),
    ("ru", True, "Где стоит маяк?", "На острове Гранитном."),
    ("ru", True, "Какова высота маяка?", "42 метра", "short"),
    ("ru", False, "Кто построил маяк?", "Иван Петров построил маяк."),
    ("ru", False, "Какова высота маяка?", "Высота маяка 24 метра."),
    ("ru", False, "Работает ли маяк с 1990 года?", "Маяк работает с 1990 года."),
    # Written after the checks were made, and not looked at while they were.
    ("en lake", True, "How large is the lake?", "It covers 38 km²."),
    ("en lake", True, "How deep is it?", "Up to 95 metres", "short"),
    ("en lake", True, "Who led the Orrin Trust?", "Maud Fell led it."),
    ("en lake", True, "Since when is swimming banned?", "Since an algae outbreak in 2003."),
    ("en lake", True, "Do its trout migrate?", "No, the trout do not migrate."),
    ("en lake", True, "What was bought in 1974?", "The eastern shore was bought by the Orrin Trust."),
    ("en lake", True, "What did the shore cost?", "120,000 pounds"),
    ("en lake", True, "Where is the lake?", "In the Kestrel Hills."),
    ("en lake", False, "What did the shore cost?", "120,000 dollars"),
    ("en lake", False, "How deep is it?", "95 ft", "short"),
    ("en lake", False, "Who led the Orrin Trust?", "Maude Hill led the trust."),
    ("en lake", False, "Do its trout migrate?", "The trout that live there migrate every spring."),
    ("en lake", False, "What fish live there?", "Pike and perch live in the lake."),
    ("en lake", False, "When was it bought?", "In 1947."),
    ("de storm", True, "Wie hoch ist der Schaden?", "Der Schaden liegt bei 800.000 Euro."),
    ("de storm", True, "Wie viele Dächer wurden beschädigt?", "14 Dächer"),
    ("de storm", True, "Wer ist Bürgermeisterin?", "Karin Lotz", "short"),
    ("de storm", True, "Bis wann sind die Schulen geschlossen?", "Bis Freitag."),
    ("de storm", False, "Wer schätzte den Schaden?", "Bürgermeister Peter Hahn."),
    ("de storm", False, "Wie hoch ist der Schaden?", "8 Millionen Euro"),
    ("de storm", False, "Wurde jemand verletzt?", "Drei Menschen wurden schwer verletzt."),
    ("zh museum", True, "新馆什么时候开放?", "2024年9月1日开放。"),
    ("zh museum", True, "馆长是谁?", "陈静", "short"),
    ("zh museum", True, "面积多大?", "2.4万平方米"),
    ("zh museum", False, "馆长是谁?", "张伟", "short"),
    ("zh museum", False, "门票收费吗?", "门票收费。"),
    ("zh museum", False, "面积多大?", "2.5万平方米"),
    ("es market", True, "¿Quién construyó el mercado?", "El arquitecto Juan Buschiazzo."),
    ("es market", True, "¿Cuántos puestos tiene?", "Tiene 150 puestos."),
    ("es market", False, "¿Cuándo fue construido?", "En 1987."),
    ("es market", False, "¿Abre los lunes?", "Abre los lunes."),
    ("es market", False, "¿Quién construyó el mercado?", "Antoni Gaudí."),
    ("ru bridge", True, "Когда открыли мост?", "В 2016 году."),
    ("ru bridge", True, "Кто разработал проект?", "Проект разработала Климова."),
    ("ru bridge", False, "Какова длина моста?", "780 метров"),
    ("ru bridge", False, "Ходят ли трамваи?", "По мосту ходят трамваи."),
    ("fr tower", True, "Quelle est la hauteur de la tour ?", "Elle mesure 96 m."),
    ("fr tower", True, "Qui était l'architecte ?", "L'architecte était Henri Vasseur."),
    ("fr tower", True, "Combien d'étages a-t-elle ?", "24 étages"),
    ("fr tower", False, "Quand fut-elle achevée ?", "Elle fut achevée en 1985."),
    ("fr tower", False, "Qui était l'architecte ?", "Jean Nouvel."),
    ("fr tower", False, "Quelle est la hauteur ?", "La tour mesure 96 pieds."),
]  # fmt: skip

MISSED = [
    ("en", False, "Who won on it?", "Ingrid Solheim won the half-marathon."),
    ("en", False, "Who designed it?", "Ben O'Connor designed it."),
    ("de", False, "Was steht am Alexanderplatz?", "Hermann Henselmann steht am Alexanderplatz."),
    ("en lake", False, "Is swimming allowed?", "Swimming is allowed since 2003."),
    ("ja", False, "今も使われていますか?", "現在は使われている。"),
]


def accepted(language, question, answer, short=""):
    title, text = TEXTS[language]
    item = KnowledgeItem("x", "entity", "thing", title, text)
    if short:
        part = Quadruplet(question=f"{title}: {question}", answer=answer, subject=title, hypernym="thing")
        return check_questions(item, Questions(questions=[part]))
    return check_dialogue(item, Dialogue(rounds=[Round(question=question, answer=answer)]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_answers_in_several_languages(case):
    language, good, *rest = case
    given, reasons = accepted(language, *rest)
    assert (given is not None) is good, reasons


def test_a_summary_may_not_say_the_opposite_of_the_text():
    item = KnowledgeItem("x", "entity", "thing", *TEXTS["en"])
    for summary, fits in (("The bridge is open to trucks.", False), ("The bridge is not open to trucks.", True)):
        given, reasons = check_caption(item, Caption(depicted="The Arkady Bridge", summary=summary))
        assert (given is not None) is fits and ("opposite" in " ".join(reasons)) is not fits


def test_the_language_of_a_text():
    assert english(TEXTS["en"][1]) and not small_words(TEXTS["en"][1])
    for language, word in (("de", "der"), ("fr", "est"), ("es", "los"), ("ru", "на")):
        assert not english(TEXTS[language][1]) and word in small_words(TEXTS[language][1])
    assert small_words("xyzzy plugh frotz gnusto rezrov blorb nitfol der ozmoo vaxum zemdor guncho") == frozenset()


@pytest.mark.parametrize("case", MISSED, ids=lambda case: f"{case[0]}-{case[3]}")
def test_what_a_comparison_of_words_does_not_find(case):
    """A case that fails here belongs to ``CASES``: the checks have become better."""
    language, good, *rest = case
    assert not good and accepted(language, *rest)[0] is not None
