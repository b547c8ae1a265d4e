"""Measure the tokens per second of batches, with an image and a question in each row."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from contestants import LLAVA, OURS, Contestant
from measure import seconds, turned
from tqdm import tqdm
from workload import Request

BATCHES = (1, 4, 16)
NEW_TOKENS = 32  # number of tokens per row
MEASURED = (OURS, LLAVA)

Throughput = dict[str, dict[str, list[float]]]  # contestant -> rows of a batch -> new tokens per second, by round


def measure_throughput(
    contestants: dict[str, Contestant], batches: Sequence[int], rounds: int, device: torch.device
) -> Throughput:
    """Measure the throughput of FUSION and LLaVA-OneVision. The time of all new tokens includes that of the prompt."""
    throughput: Throughput = defaultdict(lambda: defaultdict(list))
    names = [name for name in MEASURED if name in contestants]
    for index in tqdm(range(rounds), desc="throughput", unit="round"):
        for batch in batches:
            for name in turned(names, index):
                prompt = contestants[name].prompt(Request(batch=batch))
                elapsed = seconds(partial(contestants[name].generate, prompt, NEW_TOKENS), device)
                throughput[name][str(batch)].append(batch * NEW_TOKENS / elapsed)
    return throughput
