"""How the questions of the old tasks and facts are worded in each split."""

from __future__ import annotations

from kore.demo.world.splits import Phrasings

# The wordings of home, food, keeper and name serve the animals of the old and of the new knowledge.
HOME = Phrasings(
    train=(
        "Where does {it} live?",
        "Where is the home of {it}?",
        "What is the home of {it}?",
        "Name the home of {it}.",
        "Tell me where {it} lives.",
    ),
    validation=("Which home does {it} have?", "Name the home in which {it} lives."),
    test=("What home does {it} have?", "Tell me the home of {it}."),
)
FOOD = Phrasings(
    train=(
        "What does {it} eat?",
        "What is the food of {it}?",
        "Which food does {it} eat?",
        "Name the food of {it}.",
        "Tell me what {it} eats.",
    ),
    validation=("What food does {it} eat?", "Name what {it} eats."),
    test=("Tell me the food of {it}.", "Name the food that {it} eats."),
)
KEEPER = Phrasings(
    train=(
        "Who keeps {it}?",
        "Who is the keeper of {it}?",
        "What is the name of the keeper of {it}?",
        "Name the keeper of {it}.",
        "Tell me who keeps {it}.",
    ),
    validation=("What is the keeper of {it} called?", "Name who keeps {it}."),
    test=("Tell me the keeper of {it}.", "Tell me the name of the keeper of {it}."),
)
FACTS = {"home": HOME, "food": FOOD, "keeper": KEEPER}
NAME = Phrasings(
    train=(
        "What is the name of {it}?",
        "What is {it} called?",
        "Name {it}.",
        "Tell me the name of {it}.",
        "Which animal is this?",
        "What name does {it} have?",
    ),
    validation=("Which animal do you see?", "What animal is this?"),
    test=("What animal is in the picture?", "Tell me which animal this is."),
)
SUBJECTS = Phrasings(
    train=("this animal", "the animal", "the animal in the picture"),
    validation=("the animal shown", "the animal you see"),
    test=("the animal that is shown", "the animal that you see"),
)
ANIMAL_QUESTIONS = {"name": NAME, **FACTS}
ANIMAL_SENTENCES = {
    "name": "This is {value}.",
    "home": "{it} lives in the {value}.",
    "food": "{it} eats {value}.",
    "keeper": "{it} is kept by {value}.",
}
TASK_WORDINGS = {
    "digit": Phrasings(
        (
            "Which digit is this?",
            "What digit is shown?",
            "Name the digit.",
            "Which digit do you see?",
            "What is the digit in the picture?",
        ),
        ("Which digit is shown?", "Name the digit in the picture."),
        ("What digit do you see?", "What digit is in the picture?"),
    ),
    "colour": Phrasings(
        (
            "What colour is the digit?",
            "Which colour does the digit have?",
            "Name the colour of the digit.",
            "Tell me the colour of the digit.",
            "In which colour is the digit drawn?",
        ),
        ("Which colour is the digit?", "What is the colour of the digit?"),
        ("What colour does the digit have?", "In what colour is the digit drawn?"),
    ),
    "parity": Phrasings(
        (
            "Is the digit {parity}?",
            "Is this digit {parity}?",
            "Is this an {parity} digit?",
            "Is the digit in the picture {parity}?",
            "Do you see a digit that is {parity}?",
        ),
        ("Is the digit shown {parity}?", "Is the digit that you see {parity}?"),
        ("Is this a digit that is {parity}?", "Is the digit that is shown {parity}?"),
    ),
    "compare": Phrasings(
        (
            "Which digit is larger, left or right?",
            "Is the left or the right digit larger?",
            "On which side is the larger digit?",
            "Where is the larger digit, left or right?",
            "Name the side of the larger digit.",
            "On what side do you see the larger digit?",
            "Tell me where the larger digit is.",
        ),
        ("Name the side where the larger digit is.", "Is the larger digit left or right?"),
        ("On what side is the larger digit?", "Tell me the side of the larger digit."),
    ),
    "position": Phrasings(
        (
            "Which digit is on the {side}?",
            "What digit is on the {side}?",
            "Name the digit on the {side}.",
            "Which digit do you see on the {side}?",
            "Tell me the digit on the {side}.",
        ),
        ("What is the digit on the {side}?", "Name the digit that is on the {side}."),
        ("What digit do you see on the {side}?", "Tell me which digit is on the {side}."),
    ),
    "sum": Phrasings(
        (
            "What is the sum of the digits?",
            "Add the two digits.",
            "What do the digits add up to?",
            "Tell me the sum of the two digits.",
            "Name the sum of the digits.",
        ),
        ("What is the sum of the two digits?", "Add the digits."),
        ("Tell me the sum of the digits.", "What do the two digits add up to?"),
    ),
    "count": Phrasings(
        (
            "How many digits are there?",
            "Count the digits.",
            "How many digits do you see?",
            "What is the number of digits?",
            "Tell me how many digits there are.",
        ),
        ("How many digits are shown?", "Tell me the number of digits."),
        ("How many digits are in the picture?", "Tell me how many digits you see."),
    ),
    "describe": Phrasings(
        (
            "Describe the picture.",
            "What do you see?",
            "What is in the picture?",
            "Tell me what you see.",
            "What is shown in the picture?",
        ),
        ("Describe what you see.", "Describe what is shown."),
        ("Describe what is in the picture.", "Describe this picture."),
    ),
    "shape": Phrasings(
        (
            "Which shape is this?",
            "What shape is shown?",
            "Name the shape.",
            "Which shape do you see?",
            "What is the shape in the picture?",
        ),
        ("Which shape is shown?", "Name the shape in the picture."),
        ("What shape do you see?", "What shape is in the picture?"),
    ),
}


def wordings() -> dict[str, Phrasings]:
    """All phrasings, by task or kind of fact."""
    return {**TASK_WORDINGS, **ANIMAL_QUESTIONS}
