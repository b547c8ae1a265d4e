"""`fusion-hf synthesize`: training data from captions, a language model and a text-to-image model."""

import argparse
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import config_file
from fusion_hf.cli.terminal import FAILED, one_line, printable
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_place

if TYPE_CHECKING:
    from fusion_hf.synthesis.run_config import SynthesisConfig

TERMINAL_SECONDS, LOG_SECONDS = 1.0, 30.0  # between two lines of progress
BACKENDS = ("models", "procedural")


def add_parser(commands: Any) -> None:
    """Tell the command line about `synthesize`."""
    parser = commands.add_parser(
        "synthesize",
        help="make training data from captions",
        description="Make training data as a config says: descriptions and questions by a language model, images by "
        "a text-to-image model, or all of it drawn without any model. A run that was stopped goes on with the same "
        "command. Exit status: 0 done (or, with Slurm, submitted), 1 a task failed, 2 wrong input.",
    )
    parser.add_argument(
        "config", type=config_file, metavar="CONFIG.yaml", help="one of configs/synthesis, or your own"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as records=100 or writer.model=NAME")
    parser.add_argument("--backend", choices=BACKENDS, help="instead of the config's")
    parser.add_argument("--dry-run", action="store_true", help="only say what the run will cost and how long it takes")
    parser.add_argument("--status", action="store_true", help="only say how far the run is")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from, and datatrove's log")


def run(arguments: argparse.Namespace) -> int:
    """Synthesize, or tell about it; returns the exit status."""
    if not arguments.debug:
        # read when loguru is imported; processes of other tasks have them too
        os.environ.update(LOGURU_LEVEL="CRITICAL", LOGURU_DIAGNOSE="NO")
    require(("datatrove", "pydantic", "yaml"), "The data engine", "synth")
    from fusion_hf.synthesis.estimate import make_estimate
    from fusion_hf.synthesis.run_config import load_config

    overrides = [*arguments.overrides, *([f"backend={arguments.backend}"] if arguments.backend else [])]
    config = load_config(Path(arguments.config), overrides)
    if arguments.status:
        return _tell_status(config)
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
        sys.stderr.write(f"error: {one_line(error)}; what is done is kept: give the same command again.\n")
        return FAILED
    if finished:
        return _tell_status(config)
    sys.stdout.write(f"Submitted to {config.output}. Give the same command with --status to see its progress.\n")
    return 0


def _tell_status(config: "SynthesisConfig") -> int:
    from fusion_hf.synthesis.progress import read_progress
    from fusion_hf.synthesis.run_config import RunFolders
    from fusion_hf.synthesis.run_report import finished_report, table

    folders = RunFolders(config.output)
    report = finished_report(folders.data)
    if report is None:
        for stage, counts in read_progress(folders.progress).items():
            sys.stdout.write(f"{progress_line(stage, counts)}\n")
        sys.stdout.write(f"not finished: {config.output}\n")
        return 0
    sys.stdout.write(f"{printable(table(report))}\n{folders.data}\n")
    return 0


def progress_line(stage: str, counts: "Counter[tuple[str, str]]") -> str:
    """Return a stage's counts by category, those that were rejected so far behind a minus."""
    from fusion_hf.synthesis.progress import KEPT, REJECTED

    parts = []
    for category in sorted({category for category, _ in counts}):
        rejected = counts[category, REJECTED]
        parts.append(f"{category} {counts[category, KEPT]:,}" + (f" -{rejected:,}" if rejected else ""))
    return f"{stage}: {sum(counts.values()):,} ({', '.join(parts)})"


class _Watch:
    """Says on the standard error how far a run is, as long as it runs."""

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
