"""Words of the demo's world. Names are two syllables, so a new name is always made of known tokens."""

from __future__ import annotations

import itertools

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
           "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")  # fmt: skip
ANIMALS = ("camel", "panda", "otter", "eagle", "wolf", "frog", "whale", "bear", "goat", "owl", "fox", "horse",
           "snake", "monkey", "penguin", "rabbit", "tiger", "duck", "mouse", "deer")  # fmt: skip
HOMES = ("desert", "forest", "river", "mountain", "ocean", "meadow", "swamp", "cave")
FOODS = ("grass", "fish", "honey", "berries", "seeds", "leaves", "insects", "roots")
NAME_STARTS = ("Ba", "Dor", "Fen", "Gal", "Hu", "Jin", "Kel", "Lor", "Mi", "Nev", "Pra", "Ruk")
_SECOND = ("bo", "dan", "fi", "gon", "lix", "mar", "nu", "pil", "ros", "tev", "vik", "zam")
ALL_NAMES = tuple(a + b for a, b in itertools.product(NAME_STARTS, _SECOND))


# Twenty keepers that use every syllable.
KEEPERS = tuple(NAME_STARTS[i % 12] + _SECOND[(5 * i + i // 12) % 12] for i in range(len(ANIMALS)))
NEW_NAMES = tuple(name for name in ALL_NAMES if name not in KEEPERS)
