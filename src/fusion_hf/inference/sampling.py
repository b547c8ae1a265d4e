"""Sampled answers that do not depend on the other answers in a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from fusion_hf.inference.sampling_options import SamplingOptions


class GumbelNoise(LogitsProcessor):
    """
    Add noise to logits, so that the largest sum is a sample of their probabilities.

    `generate` draws the tokens of all rows from one stream of random numbers, so that a row depends on the others.
    Here each row has its own stream, on the CPU, which is the same for all devices.

    Args:
        seeds: The seed of each row.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores `(B, V)` with noise."""
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=each) for each in self.generators])
        noise = -(-uniform.clamp_min(torch.finfo(torch.float32).tiny).log()).log()
        return scores + noise.to(scores.device)  # type: ignore[return-value]


def generate_keywords(rows: Sequence[SamplingOptions]) -> dict[str, Any]:
    """
    Make the arguments of `generate` that choose the answers.

    Args:
        rows: Options of each row of a batch, which may differ only in their seeds.

    Returns:
        Keyword arguments of `generate`, without the length.
    """
    options = rows[0]
    keywords: dict[str, Any] = {"do_sample": False, "num_beams": options.num_beams}
    if options.is_sampled:
        processors: list[LogitsProcessor] = [TemperatureLogitsWarper(options.temperature)]
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(options.top_p))
        processors.append(GumbelNoise([each.seed for each in rows]))
        keywords["logits_processor"] = LogitsProcessorList(processors)
    return keywords
