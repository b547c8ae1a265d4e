"""`fusion-hf synthesize`: synthesize training data from captions with a language and a text-to-image model."""

import argparse
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import config_file
from fusion_hf.cli.model_options import DEBUG
from fusion_hf.cli.terminal import FAILED, one_line, printable
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_place

if TYPE_CHECKING:
    from fusion_hf.synthesis.run_config import SynthesisConfig

TERMINAL_SECONDS, LOG_SECONDS = 1.0, 30.0  # between two lines of progress
BACKENDS = ("models", "procedural")


def add_parser(commands: Any) -> None:
    """Add `synthesize` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "synthesize",
        help="Synthesize training data from captions.",
        description="Synthesize training data as a configuration describes: a language model writes descriptions and "
        "questions and a text-to-image model makes the images, or both are drawn without any model. If a run was "
        "interrupted, the same command resumes it. Requires the extra `synth`. The exit status is 0 if the run is "
        "finished (or, with Slurm, submitted), 1 if a task failed and 2 for wrong input.",
        examples=(
            "fusion-hf synthesize config.yaml --dry-run",
            "fusion-hf synthesize config.yaml records=100 writer.model=NAME",
            "fusion-hf synthesize OUTPUT_DIR --status",
        ),
    )
    parser.add_argument(
        "config",
        type=config_file,
        metavar="CONFIG.yaml",
        help="The configuration: your own, or one of configs/synthesis in the package. With --status, you can "
        "also give the output folder of the run.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Keys of the configuration with other values, such as records=100 or writer.model=NAME.",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="Use language and text-to-image models (models) or draw everything (procedural) (default: the backend in "
        "the configuration).",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Estimate the cost and the duration of the run; run nothing."
    )
    parser.add_argument("--status", action="store_true", help="Show the progress of the run; run nothing.")
    parser.add_argument(
        DEBUG,
        action="store_true",
        help="Show the traceback of an error, the messages of libraries and the log of datatrove.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Synthesize data, or show the cost or the progress of a run, and return the exit status."""
    if not arguments.debug:
        # read when loguru is imported; processes of other tasks have them too
        os.environ.update(LOGURU_LEVEL="CRITICAL", LOGURU_DIAGNOSE="NO")
    require(("datatrove", "pydantic", "yaml"), "The data engine", "synth")
    from fusion_hf.synthesis.estimate import make_estimate
    from fusion_hf.synthesis.run_config import load_config

    overrides = [*arguments.overrides, *([f"backend={arguments.backend}"] if arguments.backend else [])]
    if arguments.status and Path(arguments.config).is_dir():
        return _tell_status(Path(arguments.config))
    config = load_config(Path(arguments.config), overrides)
    if arguments.status:
        return _tell_status(config.output)
    lines = make_estimate(config).lines()
    if arguments.dry_run:
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    check_place(config.output, "output")
    sys.stderr.write("\n".join(lines) + "\n")
    return _synthesize(config, quiet=not arguments.debug)


def _synthesize(config: "SynthesisConfig", quiet: bool) -> int:
    from fusion_hf.synthesis.executors import TaskFailed
    from fusion_hf.synthesis.pipeline import run
    from fusion_hf.synthesis.run_config import RunFolders

    try:
        with _Watch(RunFolders(config.output).progress):
            finished = run(config, quiet)
    except TaskFailed as error:
        sys.stderr.write(f"error: {one_line(error)}; finished tasks are kept, so run the same command to resume.\n")
        return FAILED
    if finished:
        return _tell_status(config.output)
    sys.stdout.write(f"Submitted. To see the progress, run: fusion-hf synthesize {config.output} --status\n")
    return 0


def _tell_status(output: Path) -> int:
    from fusion_hf.synthesis.progress import read_progress
    from fusion_hf.synthesis.run_config import RunFolders
    from fusion_hf.synthesis.run_report import finished_report, table

    folders = RunFolders(output)
    report = finished_report(folders.data)
    if report is None:
        for stage, counts in read_progress(folders.progress).items():
            sys.stdout.write(f"{progress_line(stage, counts)}\n")
        sys.stdout.write(f"not finished: {output}\n")
        return 0
    sys.stdout.write(f"{printable(table(report))}\n{folders.data}\n")
    return 0


def progress_line(stage: str, counts: "Counter[tuple[str, str]]") -> str:
    """Format the counts of a stage by category, with the number of rejected records behind a minus."""
    from fusion_hf.synthesis.progress import KEPT, REJECTED

    parts = []
    for category in sorted({category for category, _ in counts}):
        rejected = counts[category, REJECTED]
        parts.append(f"{category} {counts[category, KEPT]:,}" + (f" -{rejected:,}" if rejected else ""))
    return f"{stage}: {sum(counts.values()):,} ({', '.join(parts)})"


class _Watch:
    """Writes the progress of a run to the standard error while it runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stream = sys.stderr  # the run redirects it
        self.is_terminal = self.stream.isatty()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.last = ""

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.done.set()
        self.thread.join()
        if self.is_terminal and self.last:
            self.stream.write("\n")

    def _work(self) -> None:
        while not self.done.wait(TERMINAL_SECONDS if self.is_terminal else LOG_SECONDS):
            self._say()

    def _say(self) -> None:
        from fusion_hf.synthesis.progress import read_progress

        stages = read_progress(self.folder)
        if not stages:
            return
        line = progress_line(*list(stages.items())[-1])
        if line != self.last:
            self.stream.write(f"\r\033[K{line}" if self.is_terminal else f"{line}\n")
            self.stream.flush()
            self.last = line
