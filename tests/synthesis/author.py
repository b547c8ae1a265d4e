"""A writer for the scripted server: it answers each prompt of each category as a careful language model would."""

import json
import re
from dataclasses import dataclass
from typing import Any

from tests.helpers.openai_server import Payload, prompt_of

COLORS = "red green blue yellow purple orange brown pink".split()
THINGS = "ball kite lamp vase chair drum hat book".split()
COUNTS = "two three four five six seven eight nine".split()
TRAVEL = "train harbor airport bakery garden market museum station".split()
CAPTION = re.compile(r"(\w+) (\w+) (\w+)s beside the (\w+) of (\w+)")
NAME_LETTERS = "abcdefghij"
QUOTED = re.compile(r'"([A-Z]+)"')


def name_of(number: int) -> str:
    """A made-up name that no other number has."""
    return "".join(NAME_LETTERS[int(digit)] for digit in f"{number:05d}").title()


@dataclass(frozen=True)
class Scene:
    """What a caption says."""

    count: str
    color: str
    thing: str
    place: str
    name: str

    @classmethod
    def of_number(cls, number: int) -> "Scene":
        words = [part[number // 8**power % 8] for power, part in enumerate((COUNTS, COLORS, THINGS, TRAVEL))]
        return cls(*words, name_of(number))

    @property
    def caption(self) -> str:
        return f"{self.count} {self.color} {self.thing}s beside the {self.place} of {self.name}"

    def described(self, color: str | None = None) -> str:
        return (
            f"{self.count.title()} {color or self.color} {self.thing}s stand in a row on a wooden table in front of "
            f'the {self.place}. A large sign above the table says "{self.name.upper()}" in black letters. To the left '
            "of the table sits a white dog, and behind the table there is a gray wall with one window."
        )


def make_captions(count: int) -> list[str]:
    return [Scene.of_number(number).caption for number in range(count)]


def write(payload: Payload) -> str:
    """The answer to any prompt of the categories, as JSON."""
    prompt = prompt_of(payload)
    if found := CAPTION.search(prompt):
        return json.dumps(describe(Scene(*found.groups()), two="two pictures" in prompt))
    kind = payload["response_format"]["json_schema"]["name"] if "response_format" in payload else ""
    return json.dumps(converse(prompt, kind))


def describe(scene: Scene, two: bool) -> dict[str, str]:
    if not two:
        return {"description": scene.described()}
    other = COLORS[(COLORS.index(scene.color) + 1) % len(COLORS)]
    change = f"The {scene.thing}s are {other} in the second picture."
    return {"first": scene.described(), "second": scene.described(other), "difference": change}


WALL = (
    "Behind the table there is a gray wall, and it has one window. A large sign hangs above the table and carries a "
    "name in black letters, while a white dog sits quietly to the left of all this."
)


def converse(prompt: str, kind: str) -> dict[str, Any]:
    """Questions and answers on the description in a prompt."""
    found = re.search(r"(\w+) (\w+) (\w+)s stand in a row", prompt)
    assert found is not None, prompt
    count, color, thing = found[1].lower(), found[2], found[3]
    sign = QUOTED.search(prompt)
    assert sign is not None, prompt
    if kind == "ReasonedAnswer":
        steps = ["The dog sits to the left of the table.", "The window is in the wall behind the table."]
        question = "Is the dog or the window farther back in this picture, and how can one tell?"
        return {"question": question, "reasoning": steps, "answer": "The window is farther back than the white dog."}
    if kind == "ChoiceConversation":
        return {"turns": [choice(thing, color), animal_choice()]}
    if "The right picture:" in prompt:
        return contrast(prompt, thing, long="detailed comparison" in prompt)
    return {"turns": [{"question": q, "answer": a} for q, a in turns(prompt, count, color, thing, sign[1])]}


def choice(thing: str, color: str) -> dict[str, Any]:
    others = [other for other in COLORS if other != color][:3]
    return {"question": f"Which color do the {thing}s on the table have?", "options": [*others, color], "answer": "D"}


def animal_choice() -> dict[str, Any]:
    options = ["a cat", "a dog", "a cow", "a pig"]
    return {"question": "Which animal sits beside the wooden table?", "options": options, "answer": "B"}


def contrast(prompt: str, thing: str, long: bool) -> dict[str, Any]:
    first, second = re.findall(rf"(\w+) {thing}s stand in a row", prompt)[:2]
    short = [
        ("What is different between the two pictures?", f"The color of the {thing}s."),
        (f"What color are the {thing}s in each picture?", f"They are {first} on the left and {second} on the right."),
    ]
    told = (
        f"The {thing}s on the table have another color: they are {first} in the left picture and {second} in the "
        "right picture. The wooden table, the white dog, the gray wall and the sign are the same in both of them."
    )
    chosen = [("How do the two pictures differ from each other?", told)] if long else short
    return {"turns": [{"question": question, "answer": answer} for question, answer in chosen]}


def turns(prompt: str, count: str, color: str, thing: str, sign: str) -> list[tuple[str, str]]:
    """As many and as long ones as the prompt wants."""
    scene = ("What does this picture show behind the table, and beside it?", WALL)
    if "Give one or two turns" in prompt:
        return [scene]
    if "Give two to four turns" in prompt:
        again = ("Where is everything in this picture, seen from the table?", WALL.replace("Behind", "In back of"))
        return [scene, again]
    return [
        (f"What color are the {thing}s on the table?", color.title()),
        (f"How many {thing}s stand on the table?", count.title()),
        ("Which word is on the sign above the table?", f'"{sign}"'),
    ]


def judge(score: int) -> str:
    return json.dumps({"score": score, "reason": "as the test says"})
