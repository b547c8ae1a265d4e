"""Whole training runs of a tiny FUSION, in processes that a test may kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image
from tests.helpers.forked import start_forked
from tests.helpers.tiny import tiny_config, tiny_model
from transformers import PreTrainedTokenizerFast

from fusion_hf import FusionConfig
from fusion_hf.nano.build import build_config, build_processor

NANO = Path(__file__).parents[2] / "src" / "fusion_hf" / "checkpoints" / "fusion-nano"
COMMAND = ["-m", "fusion_hf", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SECONDS = 300  # a hung run fails its test
POLL_SECONDS = 0.002
EXACT = ("loss", "language_loss", "mapping_loss", "grad_norm", "learning_rate", "epoch")
TOKEN_IDS = ("image_token_id", "latent_token_id", "vision_start_token_id", "vision_end_token_id")
QUESTIONS = ("what color is the circle ?", "how many shapes are there ?", "is there a red square ?")
ANSWERS = ("red", "two", "no", "the circle is left of the square .")


def run_config(tokenizer: PreTrainedTokenizerFast, backbone: str = "llama", **text: Any) -> FusionConfig:
    """Small enough for some 20 steps per second, with the ids and the images of `fusion-nano`."""
    nano = build_config(tokenizer)
    text_values = {
        "vocab_size": nano.text_config.vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "image_size": nano.vision_config.image_size,
        "patch_size": 12,
    }
    ids = {name: getattr(nano, name) for name in (*TOKEN_IDS, "instruct_pad_token_id")}
    return tiny_config(backbone, text_values | text, vision, sampler_num_heads=2, **ids)


def write_model(folder: Path, seed: int = 0) -> Path:
    """A FUSION with the tokenizer and the images of `fusion-nano`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(NANO)
    config = run_config(tokenizer)
    tiny_model(config, seed, scale=1.0).save_pretrained(folder)
    build_processor(tokenizer, config).save_pretrained(folder)
    return folder


def write_records(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """A JSON file; two of three records have an image."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    records = []
    for number in range(count):
        record: dict[str, Any] = {"id": str(number)}
        question = generator.choice(QUESTIONS)
        if number % 3:
            record["image"] = f"{number}.png"
            color = tuple(generator.randrange(256) for _ in range(3))
            Image.new("RGB", (generator.randrange(20, 60), 40), color).save(folder / record["image"])
            question = f"<image>\n{question}"
        turns = [("human", question), ("gpt", generator.choice(ANSWERS))]
        record["conversations"] = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


@dataclass
class Run:
    """A run's recipe and its folder."""

    recipe: Path
    output: Path

    @classmethod
    def make(cls, folder: Path, model: Path, data: Path, **keys: Any) -> "Run":
        folder.mkdir(parents=True)
        values = {
            "model": str(model),
            "data": str(data),
            "data_cache": str(data.parent / "cache"),
            "output_dir": str(folder / "output"),
            "global_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "save_steps": 3,
            "save_total_limit": 2,
            "logging_steps": 1,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "peak_tflops": 1.0,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 1,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values | keys))
        return cls(folder / "recipe.yaml", folder / "output")

    def start(self, file_size_limit: int | None = None) -> "Started":
        """Run the command in a forked process; writing files larger than the limit fails in it."""
        folder = self.recipe.parent
        process = start_forked(["train", self.recipe], folder, file_size_limit=file_size_limit)
        assert process.pid is not None
        return Started(psutil.Process(process.pid), process, folder / "stderr.txt")

    def start_command(self, processes: int = 1) -> "Started":
        """Run the command as a user does, under torchrun where there are several processes."""
        launcher = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
        errors = self.recipe.with_name("stderr.txt")
        with errors.open("w") as file:
            process = subprocess.Popen([*launcher, *COMMAND, str(self.recipe)], env=ENVIRONMENT, stderr=file)
        return Started(psutil.Process(process.pid), process, errors)

    def finish(self) -> None:
        started = self.start()
        assert started.end() == 0, started.stderr()

    def log(self) -> list[dict[str, float]]:
        """What each logged step of training says, in the file's order; a line being written is left out."""
        path = self.output / "log.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if "loss" in entry]

    def exact_log(self) -> list[tuple[Any, ...]]:
        """The figures that a resumed run must repeat to the last bit."""
        return [(entry["step"], *(entry[name] for name in EXACT)) for entry in self.log()]

    def last_step(self) -> int:
        """The last logged step, 0 before the first."""
        return max((int(entry["step"]) for entry in self.log()), default=0)

    def weights(self) -> bytes:
        """Of the finished model."""
        return (self.output / "model.safetensors").read_bytes()

    def names(self) -> set[str]:
        return {path.name for path in self.output.glob("*checkpoint-*")}


@dataclass
class Started:
    """A command that runs. `handle` is what began it and knows its exit status."""

    process: psutil.Process
    handle: ForkServerProcess | subprocess.Popen
    errors: Path

    def stderr(self) -> str:
        return self.errors.read_text()

    def running(self) -> bool:
        if isinstance(self.handle, subprocess.Popen):
            return self.handle.poll() is None
        return self.handle.is_alive()

    def end(self) -> int | None:
        """Its exit status, negative if a signal ended it."""
        if isinstance(self.handle, subprocess.Popen):
            return self.handle.wait(SECONDS)
        self.handle.join(SECONDS)
        assert not self.handle.is_alive(), f"the run hangs: {self.stderr()}"
        return self.handle.exitcode

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until it happened, or the process is over."""
        end = time.monotonic() + SECONDS
        while not happened() and self.running():
            assert time.monotonic() < end, f"nothing happens: {self.stderr()}"
            time.sleep(POLL_SECONDS)

    def signal(self, number: int) -> None:
        """To it and all that it began: data workers, and those that a launcher puts into sessions of their own."""
        with suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def kill(self) -> bool:
        """SIGKILL to all of it; False if it was over before."""
        if not self.running():
            return False
        processes = [self.process, *self.process.children(recursive=True)]
        self.signal(signal.SIGKILL)
        self.end()
        psutil.wait_procs(processes, SECONDS)
        return True
