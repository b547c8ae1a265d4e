"""Measure how the time to the first token grows with the prompt's length, turns, and questions about one image."""

from collections import defaultdict
from typing import Any

import torch
from contestants import LLAVA, OURS, Contestant
from measure import seconds, turned
from tqdm import tqdm
from workload import ONE_QUESTION, Request

QUESTION_LENGTHS, TURNS, QUESTIONS = (20, 100, 400, 1600), (1, 2, 4, 8), (1, 2, 5, 10)
GROWN = (OURS, LLAVA)
SHARED = "ours, tiles shared"

Growth = dict[str, dict[str, dict[str, list[float]]]]  # what grows -> contestant -> amount -> one value per round


def first_token_seconds(contestant: Contestant, request: Request, device: torch.device, **given: Any) -> float:
    prompt = contestant.prompt(request)
    return seconds(lambda: contestant.generate(prompt, 1, **given), device)


def question_seconds(contestant: Contestant, device: torch.device, shared: bool) -> dict[int, float]:
    """Return the seconds until the first tokens of so many answers in a row. With `shared`, tiles are encoded once."""
    total = 0.0
    reached: dict[int, float] = {}
    given: dict[str, torch.Tensor] = {}
    if shared:
        pixel_values = contestant.prompt(ONE_QUESTION)["pixel_values"]
        features: list[torch.Tensor] = []
        encode = contestant.model.get_global_features
        total += seconds(lambda: features.append(encode(pixel_values)), device)
        given = {"global_features": features[0]}
    for number in range(1, max(QUESTIONS) + 1):
        total += first_token_seconds(contestant, ONE_QUESTION, device, **given)
        reached[number] = total
    return {number: reached[number] for number in QUESTIONS}


def growth_round(growth: Growth, contestants: dict[str, Contestant], index: int, device: torch.device) -> None:
    """Measure everything once. The order of the contestants rotates with the number of the round."""
    for name in turned(list(contestants), index):
        contestant = contestants[name]
        for length in QUESTION_LENGTHS:
            elapsed = first_token_seconds(contestant, Request(question_tokens=length), device)
            growth["question_tokens"][name][str(length)].append(elapsed)
        for turns in TURNS:
            elapsed = first_token_seconds(contestant, Request(turns=turns), device)
            growth["turns"][name][str(turns)].append(elapsed)
        for label, shared in ((name, False), *([(SHARED, True)] if name == OURS else [])):
            for number, elapsed in question_seconds(contestant, device, shared).items():
                growth["questions"][label][str(number)].append(elapsed)


def measure_growth(contestants: dict[str, Contestant], rounds: int, device: torch.device) -> Growth:
    """Measure the growth for FUSION and LLaVA-OneVision, in seconds by round."""
    grown = {name: contestants[name] for name in GROWN if name in contestants}
    growth: Growth = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for index in tqdm(range(rounds), desc="growth", unit="round"):
        growth_round(growth, grown, index, device)
    return growth
