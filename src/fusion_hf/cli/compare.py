"""`fusion-hf compare`: which of two runs is better, and where two runs that should be equal begin to differ."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.terminal import printable
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_new_file, json_bytes, write_atomically


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `compare`."""
    parser = commands.add_parser(
        "compare",
        help="compare two evaluations of the same questions",
        description="Compare two evaluations of the same questions: which one is better, and which answers changed.",
    )
    for name, which in (("run_a", "the first"), ("run_b", "the second")):
        parser.add_argument(
            name,
            metavar=name.upper(),
            help=f"{which} run: a record of `fusion-hf evaluate` or its folder, a file or folder of lmms-eval's "
            "--log_samples, or the authors' answers.jsonl",
        )
    parser.add_argument("--tasks", metavar="NAMES", help="by commas; default: all that both runs have")
    parser.add_argument("--page", metavar="FILE.html", help="write the changed answers with their images")
    parser.add_argument("--json", action="store_true", help="write JSON for programs")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Compare; returns the exit status."""
    require(("scipy",), "A comparison", "eval")
    page = None if arguments.page is None else Path(arguments.page)
    if page is not None:
        check_new_file(page, "--page")
    from fusion_hf.evaluation.comparison_report import describe_comparison, write_text
    from fusion_hf.evaluation.run_answers import read_run
    from fusion_hf.evaluation.run_comparison import compare_runs

    first, second = (read_run(Path(given)) for given in (arguments.run_a, arguments.run_b))
    names = None if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    tasks = compare_runs(first, second, names)
    if arguments.json:
        sys.stdout.write(json_bytes(describe_comparison(first, second, tasks), indent=2).decode())
    else:
        sys.stdout.write(printable(write_text(first, second, tasks)))
    if page is not None:
        from fusion_hf.evaluation.comparison_page import write_page

        write_atomically(page, write_page(first, second, tasks).encode())
        if not arguments.json:
            sys.stdout.write(printable(f"{page}\n"))
    return 0
