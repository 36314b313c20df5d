"""Small knowledge files for the tests of the augmentation: invented films and news, with facts and drawn images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("Solt", "Veren", "Ilmar", "Quessa", "Brandt", "Oyelo", "Tarrin", "Wexley")
PLACES = ("Lisbon", "Oslo", "Turin", "Quito", "Riga", "Accra", "Hanoi")


def knowledge_row(number: int) -> dict[str, Any]:
    """One row: entities and news in turn."""
    who, where, year = NAMES[number % len(NAMES)], PLACES[number % len(PLACES)], 1990 + number % 30
    if number % 2:
        title = f"Harbour {number} of {where} opens"
        return {
            "id": f"news-{number}",
            "type": "politics",
            "title": title,
            "text": f"A new harbour was opened in {where} on Monday. Mira {who} built it from {year} on. "
            f"It has {number + 3} docks. The mayor of {where} cut the ribbon.",
            "facts": {"builder": f"Mira {who}", "begun": str(year), "docks": str(number + 3)},
        }
    name = f"Arvena {number}"
    return {
        "id": f"film-{number}",
        "type": "film",
        "name": name,
        "text": f"{name} is a film of {year} directed by Mira {who}. It was shot in {where}. "
        f"It won the Golden Pine in {year + 1}.",
        "facts": {"director": f"Mira {who}", "year": str(year), "place": where, "award": "the Golden Pine"},
    }


def write_knowledge(path: Path, count: int, images: bool = True) -> Path:
    """A JSONL file of rows, and below ``images`` beside it one small picture for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [knowledge_row(number) for number in range(count)]
    if images:
        from PIL import Image

        (path.parent / "images").mkdir(exist_ok=True)
        for number, row in enumerate(rows):
            colour = (number * 37 % 256, number * 91 % 256, number * 151 % 256)
            Image.new("RGB", (32, 24), colour).save(path.parent / "images" / f"{number}.png")
            row["image"] = f"images/{number}.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
