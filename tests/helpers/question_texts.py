"""Questions in many languages and scripts, drawn the same way each time."""

import json
import random
from pathlib import Path

# written down: languages and scripts, numbers, code, what looks like marks, white space, marks that combine, emoji
WRITTEN = json.loads((Path(__file__).parents[1] / "fixtures" / "question_texts.json").read_text(encoding="utf-8"))
WORDS = [word for text in WRITTEN for word in text.split()]
JOINTS = (" ", "  ", "\n", "\n\n", "", ", ", ". ", "? ", " - ", "\t", "\u00a0", "\u3000", "/", "'", "\n- ")
EDGES = ("", "", "", "", " ", "\n", "  ", "\n\n", "\t", "\r\n", "\u00a0", "\u3000")
LONG = 40  # every so many texts, one of many words
WORDS_OF_LONG = 60


def question_texts(count: int, seed: int = 20) -> list[str]:
    """The written texts, then mixtures of their words, without two that are equal."""
    draw = random.Random(seed)
    texts = dict.fromkeys(WRITTEN)
    while len(texts) < count:
        number = WORDS_OF_LONG if len(texts) % LONG == 0 else draw.randint(1, 12)
        words = draw.choices(WORDS, k=number)
        joined = "".join(word + draw.choice(JOINTS if draw.random() < 0.4 else JOINTS[:1]) for word in words)
        if draw.random() < 0.2:
            joined = "".join(draw.sample(joined, len(joined)))  # characters of different scripts side by side
        texts[draw.choice(EDGES) + joined + draw.choice(EDGES)] = None
    return list(texts)[:count]
