"""Measures what a real training step holds. Run by itself, in a process of its own: `python step_peak.py '{...}'`."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from benchmarks.memory import peak_allocated
from tests.helpers.tiny import Sample, make_inputs, tiny_config, tiny_model

from fusion_hf import FusionConfig
from fusion_hf.training.collator import find_loss_positions
from fusion_hf.training.gradient_checkpointing import enable_checkpointing
from fusion_hf.training.parameter_groups import PARTS, freeze_except

QUESTION, ANSWER = 12, 20  # tokens
STEPS = 2  # the optimizer has its moments from the first one on


@dataclass
class Case:
    """A model, a batch and how it is trained."""

    backbone: str = "llama"
    text_width: int = 256
    text_layers: int = 6
    vocabulary: int = 4000
    vision_width: int = 192
    vision_layers: int = 8
    image_side: int = 224
    query_len: int = 36
    batch: int = 1
    turns: int = 2
    answer: int = ANSWER
    checkpointing: bool = False
    bf16: bool = False
    accumulation: int = 1
    train: tuple[str, ...] = PARTS

    def config(self) -> FusionConfig:
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.text_width,
            "intermediate_size": self.text_width * 11 // 4,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2 if self.backbone != "phi3" else 8,
            "max_position_embeddings": 4096,
        }
        if self.backbone == "qwen3":
            text["head_dim"] = 128  # as in its models: the heads together are wider than the layer
        vision = {
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_width * 4,
            "num_hidden_layers": self.vision_layers,
            "image_size": self.image_side,
            "patch_size": 14,
        }
        query = {"query_len": 36, "query_lens": [4, 16, 36, 64, 144], "window_size": 3}
        return tiny_config(self.backbone, text, vision, sampler_layers=[0, 3], sampler_num_heads=8, **query)

    def inputs(self, config: FusionConfig) -> dict[str, Any]:
        """Samples of different lengths."""
        samples = [
            Sample([QUESTION + row] * self.turns, [self.answer + row] * self.turns, seed=row)
            for row in range(self.batch)
        ]
        inputs = make_inputs(config, samples, self.query_len)
        labels = inputs["input_ids"].where(inputs["input_ids"] < config.text_config.vocab_size, -100)
        # as if every token had a label: what is planned for
        positions = find_loss_positions(torch.ones_like(labels))
        return {**inputs, "labels": labels, "loss_positions": positions}


def measure(case: Case) -> int:
    """Most bytes held at a time by model, optimizer and the steps of a training under Trainer's means."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if case.bf16 else "no")
    config = case.config()

    def train() -> None:
        model = tiny_model(config, scale=1.0).train()
        freeze_except(model, case.train)
        if case.checkpointing:
            enable_checkpointing(model)
        model = accelerator.prepare_model(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        for _ in range(STEPS):
            for _ in range(case.accumulation):
                _pass(model, case.inputs(config))
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return peak_allocated(train, torch.device("cpu"))


def _pass(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    def loss() -> torch.Tensor:
        return model(**inputs, use_cache=False).loss  # as Trainer: the outputs are gone before the backward pass

    loss().backward()


def to_json(case: Case) -> str:
    return json.dumps(asdict(case))


if __name__ == "__main__":
    sys.stdout.write(f"{measure(Case(**json.loads(sys.argv[1])))}\n")
