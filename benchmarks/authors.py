"""FUSION beside the authors' running code, on one CPU: the same weights, each side in processes of its own.

You bring a checkout of their repository, and the Python of an environment with their requirements:

    python benchmarks/authors.py --authors-code DIR --authors-python PYTHON --folder WORK \\
        --output benchmarks/results/authors_intel.json
    python benchmarks/report.py

Their classes build a checkpoint with random weights; `fusion-hf convert` converts it, and `fusion-hf verify` shows
that ids, tokens and logits are equal, before anything is timed. A process of each side is started for each part. All
of them warm up, and then they are asked in turn, beginning with another one in each round. With `--parts`, some parts
are measured and added to what the output holds; with `--folder`, checkpoints are kept for the next run.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from authors_report import OURS, OURS_BFLOAT16, TABLE, THEIRS, THEIRS_BFLOAT16
from blocks import describe
from measure import names_among, positive, read_result, surroundings, turned, write_result
from safetensors.torch import save_file
from tqdm import tqdm
from workload import SIZES, Size, make_photo

from fusion_hf.common.errors import InputError
from fusion_hf.hub.parity import PARITY
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.training.collator import FusionDataCollator
from fusion_hf.verification.authors_process import (
    WORKER,
    AuthorsEnvironment,
    check_packages,
    find_environment,
    process_variables,
)

HERE = Path(__file__).parent
NANO, MIDDLE = "nano", "middle"  # checkpoints
KIND, TOWER = "llama", "siglip"
BOTH, ALL = (THEIRS, OURS), (THEIRS, THEIRS_BFLOAT16, OURS, OURS_BFLOAT16)
PHOTOS = {"12 MP": (4000, 3000), "1152 x 864": (1152, 864)}
SMALL_PHOTO = "1152 x 864"
QUESTION = "what is the astronaut holding in the left hand, and what color is it?"
TOKENS = 33  # length of the answer whose later tokens are timed
ANSWER_TOKENS = 16  # length of each of several answers
IMAGES, QUESTIONS = 8, 10
MANY = ("answer", "answer_each")  # commands with several questions
TURNS = ("what color is the suit?", "what is written on it?")
ANSWER = "it is orange and has a round badge with letters in the middle of it."
PATIENCE = 600  # timeout for an answer of a process in seconds
LOSS_TOLERANCE = 1e-4  # relative tolerance in float32
# as `fusion-hf ask` does
OUR_IMPORTS = """
from fusion_hf.cli.lean_imports import lean_imports
with lean_imports(True):
    import fusion_hf.cli.model_loading, fusion_hf.inference.conversation
"""
THEIR_IMPORTS = "import fusion.model; from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer"

Command = list[str]
Rounds = dict[str, dict[str, list[float]]]  # figure -> contestant -> a value of each round


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that the authors' classes made, and its conversion."""

    authors: Path
    tower: Path
    converted: Path

    @property
    def certificate(self) -> dict[str, Any]:
        """Return the certificate of `fusion-hf verify`."""
        return json.loads((self.converted / PARITY).read_text())


@dataclass(frozen=True)
class Bench:
    """Everything that the parts have in common."""

    environment: AuthorsEnvironment
    folder: Path
    checkpoints: dict[str, Checkpoint]
    size: str
    threads: int
    rounds: int
    sides: Sequence[str] = ALL

    @property
    def photos(self) -> dict[str, str]:
        """Return the files of the photos by their names in `PHOTOS`."""
        return {name: str(write_photo(self.folder, size)) for name, size in PHOTOS.items()}

    def variables(self, name: str) -> dict[str, str]:
        """Return the environment variables of a contestant's process."""
        own = {"PYTHONPATH": str(self.environment.code)} if name.startswith(THEIRS) else {}
        return process_variables() | own | {"OMP_NUM_THREADS": str(self.threads)}

    def job(self, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the job of a contestant's process."""
        config = json.loads((checkpoint.converted / "config.json").read_text())
        return {
            "threads": self.threads,
            "dtype": "bfloat16" if name in (THEIRS_BFLOAT16, OURS_BFLOAT16) else "float32",
            "folder": str(checkpoint.converted),
            "checkpoint": str(checkpoint.authors),
            "tower": str(checkpoint.tower),
            "code": str(self.environment.code),
            "worker": str(WORKER),
            "model_type": f"fusion_{KIND}",
            "has_tower": True,
            "weights_dtype": "float32",
            "device": "cpu",
            **{key: config[key] for key in ("query_len", "image_token_id", "latent_token_id")},
        }

    def command(self, name: str, job: dict[str, Any]) -> Command:
        """Return the command that starts a contestant's process."""
        if name.startswith(THEIRS):
            return [self.environment.python, str(HERE / "authors_side.py"), json.dumps(job)]
        return [sys.executable, str(HERE / "our_side.py"), json.dumps(job)]


class Contestant:
    """A process that answers commands."""

    def __init__(self, bench: Bench, name: str):
        self.name = name
        command = bench.command(name, bench.job(name, bench.checkpoints[bench.size]))
        self.process = subprocess.Popen(
            command, env=bench.variables(name), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.parameters = self._reply()["parameters"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        return self._reply()

    def end(self) -> None:
        """Let the process end, and wait for it."""
        self.process.kill()
        self.process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise RuntimeError(f"The process of {self.name!r} ended without an answer. See its output above.")
        return json.loads(line)


@contextmanager
def contestants(bench: Bench, names: Sequence[str]) -> Iterator[dict[str, Contestant]]:
    """Start processes and load their models, and end them on exit."""
    started: dict[str, Contestant] = {}
    try:
        for name in names:
            started[name] = Contestant(bench, name)
        yield started
    finally:
        for contestant in started.values():
            contestant.end()


def alternate(
    bench: Bench, names: Sequence[str], do: str, same: str | None = None, **arguments: Any
) -> tuple[Rounds, dict[str, dict[str, Any]]]:
    """
    Ask each contestant once per round, after an uncounted first time. If a round has many questions, they alternate
    too.

    Args:
        names: the contestants. Those that `bench.sides` leaves out are not asked.
        same: the part of the answers that must be equal for both sides in float32.

    Returns:
        The numbers in the answers of all rounds, and the last answers.
    """
    one = {"do": "generate", "image": bench.photos[SMALL_PHOTO], "question": QUESTION, "tokens": ANSWER_TOKENS}
    warm_up = one if do in MANY else {"do": do, **arguments}
    rounds: Rounds = defaultdict(lambda: defaultdict(list))
    last: dict[str, dict[str, Any]] = {}
    with contestants(bench, [name for name in names if name in bench.sides]) as processes:
        for process in processes.values():
            process.ask(**warm_up)
        for index in tqdm(range(bench.rounds), desc=do):
            for name in turned(list(processes), index):
                last[name] = processes[name].ask(do, **arguments)
                for figure, value in last[name].items():
                    if isinstance(value, float):
                        rounds[figure][name].append(value)
            if same is not None and {THEIRS, OURS} <= last.keys() and last[THEIRS][same] != last[OURS][same]:
                raise RuntimeError(f"{do}: the {same} of this package must equal those of the authors' code.")
    return rounds, last


def measure_start(bench: Bench) -> Rounds:
    """Measure the time of whole processes: one that answers with one token, and one that only imports, in seconds."""
    photo = bench.photos[SMALL_PHOTO]
    rounds: Rounds = defaultdict(lambda: defaultdict(list))
    for index in tqdm(range(-1, bench.rounds), desc="start"):
        for name in turned(list(BOTH), index):
            for figure, command in start_commands(bench, name, photo).items():
                begin = time.perf_counter()
                # not this folder, whose modules must not be imported
                subprocess.run(
                    command, env=bench.variables(name), cwd=bench.folder, check=True, stdout=subprocess.DEVNULL
                )
                if index >= 0:  # the first round fills the disk cache
                    rounds[figure][name].append(time.perf_counter() - begin)
    return rounds


def start_commands(bench: Bench, name: str, photo: str) -> dict[str, Command]:
    """Return the command lines by figure."""
    if name == OURS:
        ask = [sys.executable, "-m", "fusion_hf", "ask", photo, QUESTION, "--max-new-tokens", "1"]
        ask += ["--device", "cpu", "--dtype", "float32"]
        commands = {size: [*ask, "--model", str(each.converted)] for size, each in bench.checkpoints.items()}
        imports = [sys.executable, "-c", OUR_IMPORTS]
    else:
        cold = {"cold": {"path": photo, "question": QUESTION}}
        commands = {
            size: bench.command(name, bench.job(name, each) | cold) for size, each in bench.checkpoints.items()
        }
        imports = [bench.environment.python, "-c", THEIR_IMPORTS]
    return {f"start_{size}": command for size, command in commands.items()} | {"imports": imports}


def measure_preprocessing(bench: Bench) -> Rounds:
    """Measure the time from a decoded image to pixel values, in seconds."""
    result: Rounds = {}
    for name, path in bench.photos.items():
        rounds, _ = alternate(bench, BOTH, "preprocess", image=path)
        result[f"preprocessing {name}"] = rounds["preprocessing"]
    return result


def measure_tokens(bench: Bench) -> Rounds:
    """Measure the time to the first token, and of each later token, in seconds."""
    photo = bench.photos[SMALL_PHOTO]
    return alternate(bench, ALL, "generate", same="tokens", image=photo, question=QUESTION, tokens=TOKENS)[0]


def measure_eight(bench: Bench) -> Rounds:
    """Measure the time of one question about each of eight images, from files to answers, in seconds."""
    images = [str(write_photo(bench.folder, PHOTOS[SMALL_PHOTO], number)) for number in range(IMAGES)]
    arguments = {"images": images, "questions": questions(IMAGES), "tokens": ANSWER_TOKENS}
    return alternate(bench, ALL, "answer", same="answers", **arguments)[0]


def measure_ten(bench: Bench) -> Rounds:
    """Measure the time of ten questions about one image, in seconds."""
    arguments = {"image": bench.photos[SMALL_PHOTO], "questions": questions(QUESTIONS), "tokens": ANSWER_TOKENS}
    return alternate(bench, ALL, "answer_each", same="answers", **arguments)[0]


def measure_memory(bench: Bench) -> Rounds:
    """Measure the resident memory in bytes, in fresh processes in each round."""
    rounds: Rounds = defaultdict(lambda: defaultdict(list))
    arguments = {"image": bench.photos[SMALL_PHOTO], "question": QUESTION, "tokens": ANSWER_TOKENS}
    for name in ALL:
        with contestants(bench, [name]) as processes:
            for figure, value in processes[name].ask("memory", **arguments).items():
                rounds[figure][name].append(value)
    return rounds


def measure_training(bench: Bench) -> Rounds:
    """Measure the time (seconds) and memory (bytes) of a training step, with gradient checkpointing on both sides."""
    batch = str(write_batch(bench))
    rounds, _ = alternate(bench, BOTH, "step", batch=batch)
    losses = rounds["loss"]  # losses after several updates also show whether all weights are updated
    if any(abs(ours / theirs - 1) > LOSS_TOLERANCE for ours, theirs in zip(losses[OURS], losses[THEIRS], strict=True)):
        raise RuntimeError(f"The losses must be equal after the same number of steps, got {dict(losses)}.")
    for name in BOTH:
        with contestants(bench, [name]) as processes:
            processes[name].ask("step", batch=batch)  # creates AdamW's moments
            for figure, value in processes[name].ask("step_memory", batch=batch).items():
                rounds[figure][name] = [value]
    return rounds


PARTS: dict[str, Callable[[Bench], Rounds]] = {
    "start": measure_start,
    "preprocessing": measure_preprocessing,
    "tokens": measure_tokens,
    "eight": measure_eight,
    "ten": measure_ten,
    "memory": measure_memory,
    "training": measure_training,
}


def questions(count: int) -> list[str]:
    """Return so many different questions."""
    return [f"{QUESTION} answer in {number} words." for number in range(count)]


def write_photo(folder: Path, size: tuple[int, int], number: int = 0) -> Path:
    """
    Write a photo in a lossless format, since two decoders may read a JPEG differently. Each number gives another
    photo.
    """
    path = folder / f"photo_{size[0]}_{number}.png"
    if not path.exists():
        make_photo(size).rotate(number).save(path)
    return path


def write_batch(bench: Bench) -> Path:
    """Write two conversations of two turns, which each side converts to its own format."""
    processor = FusionProcessor.from_pretrained(bench.checkpoints[bench.size].converted)
    turns = [turn for text in TURNS for turn in (("human", text), ("gpt", ANSWER))]
    conversation = [{"from": speaker, "value": text} for speaker, text in turns]
    images = [str(write_photo(bench.folder, PHOTOS[SMALL_PHOTO], number)) for number in range(2)]
    batch = FusionDataCollator(processor)([{"image": image, "conversations": conversation} for image in images])
    path = bench.folder / "batch.safetensors"
    save_file({name: value.contiguous() for name, value in batch.items() if isinstance(value, torch.Tensor)}, path)
    return path


def builder_sizes(size: Size) -> dict[str, Any]:
    """Return the sizes of a benchmark's model in the form that `authors_checkpoint` takes, with the authors' tower."""
    return {
        "tower": {
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_mlp,
            "num_attention_heads": size.vision_heads,
        },
        "text": {
            "hidden_size": size.text_width,
            "intermediate_size": size.text_mlp,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads,
            "num_key_value_heads": size.text_heads,
        },
        "vocabulary": size.vocab_size,
    }


def make_checkpoint(environment: AuthorsEnvironment, folder: Path, name: str) -> Checkpoint:
    """Build, convert and verify a checkpoint, unless the folder holds it already."""
    authors, converted = folder / f"{name}-authors", folder / name
    tower = folder / f"{name}-tower" / f"{TOWER}-tower"  # the authors' classes depend on the name of the folder
    checkpoint = Checkpoint(authors, tower, converted)
    if (converted / PARITY).is_file():
        return checkpoint
    sizes = {} if name == NANO else builder_sizes(SIZES[name])
    build = [environment.python, str(HERE / "authors_checkpoint.py"), "--code", str(environment.code)]
    build += ["--kind", KIND, "--tower", TOWER, "--sizes", json.dumps(sizes), "--output", str(authors)]
    subprocess.run(build, env=process_variables(), check=True)
    sizes = ["--vision-config", str(authors / f"{TOWER}-tower")]
    fusion = [sys.executable, "-m", "fusion_hf"]
    subprocess.run([*fusion, "convert", "--model", str(authors), *sizes, "--output", str(converted)], check=True)
    sides = ["--authors-code", str(environment.code), "--authors-python", environment.python]
    subprocess.run(
        [*fusion, "verify", "--model", str(converted), "--checkpoint", str(authors), *sizes, *sides], check=True
    )
    tower.mkdir(parents=True)
    (tower / "config.json").write_bytes((authors / f"{TOWER}-tower" / "config.json").read_bytes())
    save_file({}, tower / "model.safetensors", metadata={"format": "pt"})  # the checkpoint holds the weights
    return checkpoint


def summarize_certificate(certificate: dict[str, Any]) -> dict[str, Any]:
    """Summarize what `fusion-hf verify` found: that everything is equal, and how closely."""
    return {"equal": certificate["equal"], "stages": certificate["stages"], "questions": len(certificate["questions"])}


def add_rounds(former: Rounds, rounds: Rounds) -> Rounds:
    """Append rounds of a part. Ratios pair rounds by position, so both must have the same contestants."""
    return {
        figure: {name: former.get(figure, {}).get(name, []) + values for name, values in by_name.items()}
        for figure, by_name in rounds.items()
    }


def run(options: argparse.Namespace, environment: AuthorsEnvironment, folder: Path) -> None:
    """Measure the requested parts, and write each one to the file as soon as it is done."""
    names = dict.fromkeys([NANO, options.size])
    checkpoints = {name: make_checkpoint(environment, folder, name) for name in names}
    bench = Bench(environment, folder, checkpoints, options.size, options.threads, options.rounds, options.sides)
    result = read_result(options.output)
    result["settings"] = {"size": options.size, "threads": options.threads, "dtype": "float32 and bfloat16"}
    result |= surroundings("cpu")
    certificate = checkpoints[options.size].certificate
    result["authors"] = certificate["authors"]
    result["verified"] = {name: summarize_certificate(each.certificate) for name, each in checkpoints.items()}
    for part in options.parts:
        former = result.get(part, {}) if options.add else {}
        result[part] = add_rounds(former, PARTS[part](bench))
        write_result(result, options.output)
    sys.stdout.write(describe(TABLE, result) + "\n")


def parse_arguments(command_line: list[str] | None = None) -> tuple[argparse.Namespace, AuthorsEnvironment]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--authors-code", type=Path, required=True, metavar="DIR", help="checkout of the authors' repository"
    )
    parser.add_argument(
        "--authors-python", required=True, metavar="PYTHON", help="Python of an environment for that checkout"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder to keep checkpoints in; default: they are not kept"
    )
    parser.add_argument("--size", choices=(NANO, MIDDLE), default=MIDDLE, help="size of the model")
    parser.add_argument(
        "--parts",
        type=names_among(list(PARTS)),
        default=list(PARTS),
        help="parts to measure, separated by commas; default: all",
    )
    parser.add_argument(
        "--sides",
        type=names_among(ALL),
        default=list(ALL),
        help="contestants to measure, separated by commas; default: all",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="number of rounds that count")
    parser.add_argument(
        "--add", action="store_true", help="append to the rounds in the output file, which must have the same sides"
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file to add the parts to")
    options = parser.parse_args(command_line)
    try:
        environment = find_environment(options.authors_code, options.authors_python)
        check_packages(environment)
    except InputError as error:
        parser.error(str(error))
    return options, environment


def main(command_line: list[str] | None = None) -> None:
    options, environment = parse_arguments(command_line)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        run(options, environment, options.folder.resolve())
        return
    with TemporaryDirectory() as folder:
        run(options, environment, Path(folder).resolve())


if __name__ == "__main__":
    main()
