"""What packing of short conversations could save: the padding of micro-batches, by the order of records.

    python benchmarks/packing.py --output benchmarks/results/packing.json

Lengths are drawn, since no data set comes with the repository. `llava` has the composition of LLaVA-1.5's instruction
mixture: records of each source, and questions per image, are those of the published data sets; words of questions and
answers are estimates. `short` is what a new user has: one short question about each image, and a short answer.

Orders are those of `StepSampler`; FLOPs are those of `fusion_hf.training.flops` at the sizes of FUSION 3B, padding
included. What packing could save at most is all padding, of the language model and of the tower's questions: each
record is counted as if it were alone, without the work of attention that packed rows would waste.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.training.flops import BatchShape, step_flops
from fusion_hf.training.sampler import (
    BLOCK_MARKS,
    TOKENS_PER_WORD,
    TURN_TOKENS,
    StepLayout,
    StepSampler,
    estimate_tokens,
)

CONFIG = Path(__file__).parents[1] / "configs" / "models" / "fusion-3b.json"
RECORDS, SEED = 12_800, 0
QUERY_LENS, MEASURED_QUERY_LENS = (4, 16, 36, 64, 144), (36, 144)
MAX_LENGTH = 4096
RATE_SPREAD = 0.15  # spread of tokens per word between records
SYSTEM_TOKENS, IMAGE_TOKENS = 24, 729
ORDERS = ("none", "modality_length", "length")  # values of `group_by`


@dataclass(frozen=True)
class Source:
    """Records of one kind: their number, the number of turns, and the medians of word counts, which are log-normal."""

    records: int
    turns: float
    question: float
    answer: float
    has_image: bool = True
    spread: float = 0.5


MIXTURES = {
    "llava": {
        "conversation": Source(57_669, 4.3, 10, 24),
        "detail": Source(23_240, 1, 9, 90, spread=0.3),
        "reasoning": Source(76_643, 1, 15, 92, spread=0.3),
        "sharegpt": Source(40_688, 3.5, 30, 170, has_image=False, spread=1.0),
        "vqav2": Source(82_783, 5.4, 8, 1.1, spread=0.2),
        "gqa": Source(72_140, 13.1, 9, 1, spread=0.2),
        "okvqa": Source(8_998, 1, 18, 1.2, spread=0.2),
        "ocrvqa": Source(80_000, 4.8, 8, 3),
        "aokvqa": Source(66_160, 1, 34, 1, spread=0.2),
        "textcaps": Source(21_953, 1, 35, 12),
        "refcoco": Source(48_447, 9, 14, 9),
        "vg": Source(86_417, 9.5, 14, 9),
    },
    "short": {"short": Source(1, 1, 9, 6, spread=0.7)},
}


@dataclass(frozen=True)
class Lengths:
    """
    The lengths of records: words, as `StepSampler` uses them, turns, tokens of all texts, and tokens of
    questions.
    """

    words: np.ndarray
    turns: np.ndarray
    text: np.ndarray
    questions: np.ndarray

    def tokens(self, query_len: int) -> np.ndarray:
        """
        Return the tokens in the language model for so many latent tokens per question, with two blocks for the
        first one.
        """
        has_image = self.words > 0
        image = np.where(has_image, IMAGE_TOKENS + BLOCK_MARKS, 0)
        latents = np.where(has_image, (self.turns + 1) * (query_len + BLOCK_MARKS), 0)
        return np.minimum(SYSTEM_TOKENS + self.turns * TURN_TOKENS + self.text + image + latents, MAX_LENGTH)


@cache
def draw(mixture: str, count: int) -> Lengths:
    """Draw the lengths of `count` records, which are the same each time."""
    generator = np.random.default_rng(SEED)
    sources = list(MIXTURES[mixture].values())
    shares = np.array([source.records for source in sources], dtype=float)
    words, turns, questions = [], [], []
    for choice in generator.choice(len(sources), count, p=shares / shares.sum()):
        source = sources[choice]
        number = 1 + generator.poisson(source.turns - 1)
        asked = _words(source.question, source.spread, number, generator)
        total = asked + _words(source.answer, source.spread, number, generator)
        words.append(total if source.has_image else -total)
        turns.append(number)
        questions.append(asked)
    counts = np.array(words)
    rates = TOKENS_PER_WORD * generator.lognormal(0, RATE_SPREAD, count)  # not known to the sampler
    as_tokens = [np.ceil(np.abs(np.array(values)) * rates).astype(int) for values in (words, questions)]
    return Lengths(counts, np.array(turns), *as_tokens)


def _words(median: float, spread: float, number: int, generator: np.random.Generator) -> int:
    return int(np.ceil(median * generator.lognormal(0, spread, number)).sum())


def steps(lengths: Lengths, layout: StepLayout, order: str) -> Iterator[np.ndarray]:
    """
    Return the records of each step, `(micro-batches, batch)`, without the last steps of the epoch, which may be
    incomplete.
    """
    given = None if order == "none" else lengths.words
    sizes = estimate_tokens(lengths.words, lengths.turns, QUERY_LENS) if order == "length" else None
    sampler = StepSampler(len(lengths.words), layout, QUERY_LENS, SEED, lengths=given, sizes=sizes)
    keys = np.array([key.index for key in sampler])
    size = layout.global_batch_size
    for step in range(len(keys) // size - 2):
        yield keys[step * size : (step + 1) * size].reshape(-1, layout.batch_size)


@cache
def flops(*shape: int) -> int:
    """Count the FLOPs of a training pass of FUSION 3B with gradient checkpointing."""
    counted = step_flops(_config(), BatchShape(*shape))
    return counted.training + counted.recomputed


@cache
def _config() -> FusionConfig:
    return FusionConfig.from_pretrained(CONFIG)


@dataclass(frozen=True)
class Saving:
    """
    What packing would save.

    Attributes:
        padding: the share of padding among the positions of the language model.
        flops: the maximum share of a run's FLOPs that packing would save.
        slowest: the same for the slowest process of each pass, for which the others wait.
    """

    padding: float
    flops: float
    slowest: float


def measure(lengths: Lengths, layout: StepLayout, order: str, query_len: int) -> Saving:
    """Compute what packing would save in an epoch with this order."""
    tokens = lengths.tokens(query_len)
    positions = filled = padded_flops = packed_flops = slowest = 0
    for step in steps(lengths, layout, order):
        shapes = tokens[step], lengths.questions[step], lengths.turns[step]  # each (micro-batches, batch)
        padded = [
            flops(layout.batch_size, *(int(values[number].max()) for values in shapes), query_len)
            for number in range(len(step))
        ]
        positions += int(shapes[0].max(1).sum()) * layout.batch_size
        filled += int(shapes[0].sum())
        padded_flops += sum(padded)
        rows = zip(*(values.ravel().tolist() for values in shapes), strict=True)
        packed_flops += sum(flops(1, *row, query_len) for row in rows)
        passes = np.array(padded).reshape(layout.accumulation, layout.world_size)
        slowest += int(passes.max(1).sum()) * layout.world_size
    return Saving(1 - filled / positions, 1 - packed_flops / padded_flops, 1 - packed_flops / slowest)


LAYOUTS = {
    "one GPU, 4 records a pass": StepLayout(4, 1, 32),
    "one GPU, 8 records a pass": StepLayout(8, 1, 16),
    "8 GPUs, 4 records a pass": StepLayout(4, 8, 4),
    "32 GPUs, 4 records a pass": StepLayout(4, 32, 1),
}


@dataclass(frozen=True)
class Case:
    """A mixture, a number of latent tokens per question, a layout and an order."""

    mixture: str
    query_len: int
    layout: str
    order: str

    def measure(self, count: int) -> Saving:
        """Compute what packing would save for so many drawn records."""
        return measure(draw(self.mixture, count), LAYOUTS[self.layout], self.order, self.query_len)


def main() -> None:
    """Measure all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for case in (Case(*each) for each in product(MIXTURES, MEASURED_QUERY_LENS, LAYOUTS, ORDERS)):
        found.append({**asdict(case), **asdict(case.measure(arguments.records))})
        print(json.dumps(found[-1]))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"records": arguments.records, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
