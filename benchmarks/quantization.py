"""Measure quantized language models: memory, speed, and the accuracy of fusion-nano.

    pip install -e ".[bench,quant,train]"
    python benchmarks/quantization.py --threads 2 --output benchmarks/results/quantization_cpu.json
    python benchmarks/quantization.py --only times --threads 2 --output benchmarks/results/quantization_cpu.json
    python benchmarks/report.py

Memory and times are those of the FUSION model with random weights of `inference.py`. Each round measures every method
once, in an order that changes from round to round, and ratios are taken within a round. Accuracy is that of
fusion-nano on questions of easy-vqa's test set. With `--only`, the other part of the output is kept.
"""

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from measure import (
    DTYPES,
    add_machine_options,
    generation_seconds,
    paired_ratios,
    parse_on_machine,
    positive,
    read_result,
    surroundings,
    turned,
    write_result,
)
from quantization_report import BASE, BNB_4, BNB_8, INT4, INT8
from tqdm import tqdm
from transformers import BitsAndBytesConfig, TorchAoConfig
from workload import SIZES, Size, build_model, make_image_processor, make_photo, make_prompt

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.nano.evaluate import generate_answers
from fusion_hf.nano.training_records import test_records

SEED = 0
PARTS = ("times", "accuracy")
GROUP = 32  # number of weights that share a scale in 4 bits, which must divide the widths of layers
Make = Callable[[], Any]


def int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def int4() -> TorchAoConfig:
    """
    Return a 4-bit configuration that works on CPUs, where Int4WeightOnlyConfig has no kernels. It stores each
    value in a byte.
    """
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if torch.cuda.is_available():
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=GROUP))
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))


METHODS: dict[str, Make] = {
    BNB_8: lambda: BitsAndBytesConfig(load_in_8bit=True),
    BNB_4: lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    INT8: int8,
    INT4: int4,
}


def load(folder: str, method: str, dtype: torch.dtype, device: torch.device) -> FusionForConditionalGeneration:
    quantization = {} if method == BASE else {"quantization_config": METHODS[method]()}
    model = FusionForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=device, **quantization)
    return model.eval()


def stored_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's weights, including scales of quantized ones."""
    total = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes, 4 bits
        scales = getattr(parameter, "SCB", None)  # bitsandbytes, 8 bits
        names, _ = parameter.__tensor_flatten__() if is_torchao(parameter) else ([], None)
        total += sum(getattr(parameter, name).nbytes for name in names) if names else parameter.nbytes
        total += sum(part.nbytes for part in state.as_dict(packed=True).values()) if state is not None else 0
        total += scales.nbytes if scales is not None else 0
    return total


def is_torchao(parameter: torch.Tensor) -> bool:
    return type(parameter).__module__.startswith("torchao.")


class Times:
    """One model in all methods, a prompt, and the measurements."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device):
        self.new_tokens = size.new_tokens
        with tempfile.TemporaryDirectory() as folder:
            build_model(size, dtype, torch.device("cpu")).save_pretrained(folder)
            self.models = {name: load(folder, name, dtype, device) for name in (BASE, *METHODS)}
        pixel_values = make_image_processor(size)(make_photo(size.photo), return_tensors="pt")["pixel_values"]
        self.prompt = make_prompt(self.models[BASE].config, pixel_values.to(device, dtype))
        self.seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def round(self, index: int) -> None:
        for name in turned(list(self.models), index):
            first, later = generation_seconds(self.models[name], self.prompt, self.new_tokens)
            self.seconds["first_token_seconds"][name].append(first)
            self.seconds["per_token_seconds"][name].append(later)

    def result(self) -> dict[str, Any]:
        return {
            "bytes": {
                name: {"model": stored_bytes(model), "layers": stored_bytes(model.model.language_model.layers)}
                for name, model in self.models.items()
            },
            "ratios": {
                figure: {name: paired_ratios(values, rounds[BASE]) for name, values in rounds.items()}
                for figure, rounds in self.seconds.items()
            },
            "repeats": self.seconds,
        }


def measure_times(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    times = Times(SIZES[arguments.size], dtype, device)
    times.round(0)  # warms up
    times.seconds.clear()
    for index in tqdm(range(arguments.repeats), desc="times", unit="round"):
        times.round(index)
    return times.result()


def measure_accuracy(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Count exact answers, and answers that equal those of the original model."""
    records = [record for record in test_records(drawn=0) if record.category == "easy-vqa"]
    records = random.Random(SEED).sample(records, min(arguments.questions, len(records)))
    processor = FusionProcessor.from_pretrained(nano_path())
    answers = {
        name: generate_answers(load(nano_path(), name, dtype, device), processor, records) for name in (BASE, *METHODS)
    }
    return {
        "questions": len(records),
        "right": {
            name: sum(answer == record.turns[0][1] for answer, record in zip(given, records, strict=True))
            for name, given in answers.items()
        },
        "same": {
            name: sum(ours == base for ours, base in zip(given, answers[BASE], strict=True))
            for name, given in answers.items()
        },
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="part to measure; default: all")
    parser.add_argument("--size", choices=SIZES, default="middle", help="size of the model")
    parser.add_argument("--repeats", type=positive, default=5, help="number of rounds after one warm-up round")
    parser.add_argument("--questions", type=positive, default=2000, help="number of questions for fusion-nano")
    add_machine_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_on_machine(make_parser(), arguments)
    result = read_result(options.output)
    names = ("size", "repeats", "questions", "dtype", "device", "threads")
    settings = {name: getattr(options, name) for name in names}
    for part, measure in zip(PARTS, (measure_times, measure_accuracy), strict=True):
        if options.only in (None, part):
            with torch.inference_mode():
                measured = measure(options, DTYPES[options.dtype], torch.device(options.device))
            packages = surroundings(options.device, ("bitsandbytes", "torchao"))
            result[part] = {"settings": settings, **packages, **measured}
    write_result(result, options.output)
    print(json.dumps({part: {**result[part], "repeats": None} for part in result}, indent=1))
    return result


if __name__ == "__main__":
    main()
