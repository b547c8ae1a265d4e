"""`fusion-hf compare`: which of two runs is better, and where two runs that should be equal begin to differ."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, JSON_HELP
from fusion_hf.cli.terminal import FAILED, printable
from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_new_file, json_bytes, write_atomically

if TYPE_CHECKING:
    from fusion_hf.evaluation.run_answers import RunAnswers
    from fusion_hf.evaluation.run_comparison import TaskComparison
    from fusion_hf.evaluation.run_stages import StageReport


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `compare` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "compare",
        help="Compare two evaluations of the same questions.",
        description="Compare two evaluations of the same questions: which run is better, and which answers changed. "
        "Requires the extra `eval`. With --stages, the exit status is 1 if the runs differ.",
        examples=(
            "fusion-hf compare runs/a runs/b",
            "fusion-hf compare a.jsonl b.jsonl --questions questions.jsonl --page changes.html",
        ),
    )
    for name, which in (("run_a", "first"), ("run_b", "second")):
        parser.add_argument(
            name,
            metavar=name.upper(),
            help=f"The {which} run: a record of `fusion-hf evaluate` or its folder, a file or folder that lmms-eval "
            "wrote with --log_samples, or an answers.jsonl of the authors' code or of `fusion-hf ask`.",
        )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="Tasks to compare, separated by commas (default: all tasks that both runs have).",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="JSONL",
        help="For two answers.jsonl: the file of their questions, with the correct `answer` in each line. Answers are "
        "scored by exact match.",
    )
    parser.add_argument(
        "--page",
        metavar="FILE.html",
        help="Write an HTML page of the changed answers with their images to this new file.",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="For runs that should be equal: run both models again and name the first stage that differs.",
    )
    for name, which in (("--model-a", "RUN_A"), ("--model-b", "RUN_B")):
        parser.add_argument(
            name,
            metavar="DIR_OR_REPO",
            help=f"With --stages: the model of {which} (default: the model in its record).",
        )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Compare two runs, and return the exit status."""
    require(("scipy",), "A comparison", "eval")
    page = None if arguments.page is None else Path(arguments.page)
    if page is not None:
        check_new_file(page, "--page")
    for option, given in (("--model-a", arguments.model_a), ("--model-b", arguments.model_b)):
        if given is not None and not arguments.stages:
            raise InputError(f"`{option}` is only allowed with `--stages`, got {given}.")
    from fusion_hf.evaluation.run_answers import read_run
    from fusion_hf.evaluation.run_comparison import compare_runs

    first, second = (read_run(Path(given)) for given in (arguments.run_a, arguments.run_b))
    if arguments.questions is not None:
        from fusion_hf.evaluation.own_questions import score_answers

        first, second = (score_answers(run, arguments.questions) for run in (first, second))
    names = None if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    tasks = compare_runs(first, second, names)
    reports = _find_stages(arguments, first, second, tasks) if arguments.stages else []
    _write(arguments, first, second, tasks, reports)
    if page is not None:
        from fusion_hf.evaluation.comparison_page import write_page

        write_atomically(page, write_page(first, second, tasks).encode())
        if not arguments.json:
            sys.stdout.write(printable(f"{page}\n"))
    return 0 if all(report.first is None and report.is_reproduced for report in reports) else FAILED


def _find_stages(
    arguments: argparse.Namespace, first: "RunAnswers", second: "RunAnswers", tasks: "Sequence[TaskComparison]"
) -> "list[StageReport]":
    """Rebuild both runs, and find the first stage that differs in each task."""
    if not arguments.debug:
        from fusion_hf.cli.model_loading import silence_libraries

        silence_libraries()
    from fusion_hf.evaluation.rebuilt_run import RebuiltRun
    from fusion_hf.evaluation.run_comparison import SIDES
    from fusion_hf.evaluation.run_stages import compare_run_stages

    own = RebuiltRun.load(SIDES[0], first, arguments.model_a)
    other = RebuiltRun.load(SIDES[1], second, arguments.model_b)
    return [compare_run_stages(own, other, task) for task in tasks]


def _write(
    arguments: argparse.Namespace,
    first: "RunAnswers",
    second: "RunAnswers",
    tasks: "Sequence[TaskComparison]",
    reports: "Sequence[StageReport]",
) -> None:
    from fusion_hf.evaluation.comparison_report import describe_comparison, describe_stages, write_stages, write_text

    if arguments.json:
        content = describe_comparison(first, second, tasks)
        if arguments.stages:
            content["stages"] = [describe_stages(report) for report in reports]
        sys.stdout.write(json_bytes(content, indent=2).decode())
        return
    parts = [write_text(first, second, tasks), *(write_stages(report) for report in reports)]
    sys.stdout.write(printable("\n".join(parts)))
