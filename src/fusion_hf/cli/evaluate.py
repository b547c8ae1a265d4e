"""`fusion-hf evaluate`: evaluate a model on published benchmarks with lmms-eval."""

import argparse
import os
import sys
import textwrap
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import AUTO, DTYPES, device, positive
from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, JSON_HELP, MODEL_HELP, find_model, make_options
from fusion_hf.cli.terminal import FAILED, one_line, printable
from fusion_hf.common.endpoints import check_key
from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import check_place, json_bytes, write_atomically

if TYPE_CHECKING:
    from fusion_hf.evaluation.run_record import RunRecord

ALL = "all"
LINE = 78  # characters of a line of the list of tasks
BATCH_SIZE = 8
PROMPTS = ("authors", "lmms-eval")
OUTPUT = "evaluation"
INSTALL = "pip install 'fusion_hf[eval,train]' && pip install --no-deps lmms-eval==0.7.3"


def add_parser(commands: Any) -> None:
    """Add `evaluate` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "evaluate",
        help="Evaluate a model on published benchmarks.",
        description="Evaluate a model on published benchmarks, in one process or under `accelerate launch`. If a run "
        "was interrupted, the same command resumes it. Requires the extra `eval` and lmms-eval. The exit status is 0 "
        "if all tasks were scored, or their answers written for a server, 1 if a task failed and 2 for wrong input.",
        examples=(
            "fusion-hf evaluate --tasks easy_vqa --limit 100",
            "fusion-hf evaluate --model DIR_OR_REPO --tasks pope,mmbench_en --data-root data --dry-run",
            "fusion-hf evaluate --url http://127.0.0.1:8000/v1 --model NAME --tasks pope --concurrency 16",
        ),
    )
    parser.describe_more = _describe_tasks
    parser.add_argument(
        "--tasks",
        metavar="all|NAME,...",
        help="Names of tasks, separated by commas, or all. Required unless --table is given.",
    )
    parser.add_argument("--model", metavar="DIR_OR_REPO", help=MODEL_HELP)
    _add_server_options(parser)
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="A folder with local copies of the data, one folder per task (default: the Hub).",
    )
    parser.add_argument(
        "--prompts",
        choices=PROMPTS,
        default=PROMPTS[0],
        help="Whose prompts to use: those of the authors or those of lmms-eval (default: %(default)s).",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="Ask only the first N questions of each task (default: all)."
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"Number of questions that are answered together (default: {BATCH_SIZE}).",
    )
    parser.add_argument(
        "--output", default=OUTPUT, metavar="DIR", help="The folder of answers and records (default: %(default)s)."
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Check that the data are present and complete; evaluate nothing. Requires no lmms-eval.",
    )
    _add_table_options(parser)
    parser.add_argument(
        "--device",
        type=device,
        default=AUTO,
        help="Device to run on: cpu, cuda, cuda:1, mps or auto (default: %(default)s).",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=AUTO, help="Data type of the weights (default: %(default)s)."
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the server that is asked instead of a model in this process."""
    parser.add_argument(
        "--url",
        metavar="ADDRESS",
        help="Ask a server with an OpenAI-compatible API instead. --model is then the name of a model on the server.",
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="With --url: the environment variable with the API key of the server (default: none).",
    )
    parser.add_argument(
        "--concurrency",
        dest="parallel",
        type=positive,
        metavar="N",
        help="With --url: maximum number of concurrent requests (default: 4).",
    )


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add what the table of results shows, and of which runs."""
    parser.add_argument(
        "--published",
        metavar="NAME",
        help="The published model to compare with (default: the one with the same sizes).",
    )
    parser.add_argument("--peers", action="store_true", help="Also show the other published models of this size.")
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="RECORD.json",
        help="Print one table of these records of a model's runs; evaluate nothing.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a model, check the data or make a table, and return the exit status."""
    if arguments.published is not None:
        from fusion_hf.evaluation.results_table import find_published

        find_published(arguments.published)  # an unknown name is told before the work
    if arguments.table is not None:
        return _make_table(arguments)
    _check_place(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: lmms-eval's bars know no terminal
    names = _task_names(arguments.tasks)
    data_root = None if arguments.data_root is None else Path(arguments.data_root)
    if data_root is not None and not data_root.is_dir():
        raise InputError(f"`--data-root` must be a folder, got {arguments.data_root}.")
    if arguments.dry_run:
        return _check_data(names, data_root, arguments.json)
    if arguments.limit is not None:
        _check_limit(names)
    check_key(arguments.api_key_env, "--api-key-env")
    check_place(Path(arguments.output), "--output")
    if arguments.url is None:
        find_model(arguments)
    if find_spec("lmms_eval") is None:
        raise InputError(f"Evaluation requires the extra `eval` and lmms-eval, which is not installed: {INSTALL}")
    _require_lmms_eval(arguments.debug)
    from fusion_hf.evaluation import runner
    from fusion_hf.evaluation.results_table import make_table

    given = {"tasks": names, "output": Path(arguments.output), "data_root": data_root, "command": sys.argv}
    if arguments.batch_size is None:
        given["batch_size"] = BATCH_SIZE
    options = make_options(runner.EvaluationOptions, argparse.Namespace(**vars(arguments) | given))
    record = runner.run(options)
    if int(os.environ.get("RANK", 0)) == 0:
        path = record.write(options.output)
        table = path.with_suffix(".md")
        write_atomically(table, make_table([record], arguments.published, arguments.peers).encode())
        if arguments.json:
            sys.stdout.write(json_bytes(_describe(record, path, table), indent=2).decode())
        else:
            _report(record)
            sys.stdout.write(f"{path}\n{table}\n")
    return FAILED if record.failed else 0


def _make_table(arguments: argparse.Namespace) -> int:
    from fusion_hf.evaluation.results_table import make_table
    from fusion_hf.evaluation.run_record import RunRecord

    if arguments.tasks is not None:
        raise InputError(f"`--tasks` cannot be combined with `--table`, got {arguments.tasks!r}.")
    if arguments.json:
        raise InputError("`--json` cannot be combined with `--table`: the records are JSON already.")
    records = [RunRecord.read(Path(path)) for path in arguments.table]
    sys.stdout.write(make_table(records, arguments.published, arguments.peers))
    return 0


def _task_names(given: str | None) -> list[str]:
    """Read the names of tasks; an InputError for an unknown name, or if there is none."""
    from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS

    known = (*BENCHMARKS, *VARIANTS)
    if given is None:
        raise InputError(f"`--tasks` is required: {ALL}, or some of {', '.join(known)}.")
    if given == ALL:
        return list(BENCHMARKS)
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in known:
            raise InputError(f"`--tasks` must be {ALL}, or some of {', '.join(known)}, got {name!r}.")
    return names


def _check_place(arguments: argparse.Namespace) -> None:
    """Refuse an option that only applies to a server, or only to a model in this process."""
    if arguments.url is None:
        for option, value in (("--api-key-env", arguments.api_key_env), ("--concurrency", arguments.parallel)):
            if value is not None:
                raise InputError(f"`{option}` is only allowed with `--url`, got {value}.")
        return
    for option, value, default, instead in (
        ("--device", arguments.device, AUTO, "the server decides"),
        ("--dtype", arguments.dtype, AUTO, "the server decides"),
        (
            "--batch-size",
            arguments.batch_size,
            None,
            "use `--concurrency` instead",
        ),
    ):
        if value != default:
            raise InputError(f"`{option}` is not allowed with `--url` ({instead}), got {value}.")


def _check_limit(names: list[str]) -> None:
    """Refuse a limit if a task is answered for a server, which takes nothing but all answers."""
    from fusion_hf.evaluation.benchmarks import find_benchmark

    for name in names:
        if find_benchmark(name).is_submitted:
            raise InputError(f"`--limit` is not allowed for {name}, whose server requires all answers.")


def _require_lmms_eval(debug: bool) -> None:
    """Import lmms-eval; an InputError if it, or something that it requires, is not installed."""
    from fusion_hf.cli.model_loading import silence_libraries

    if not debug:
        silence_libraries()
    try:
        import httpx  # noqa: F401
        import lmms_eval.evaluator  # noqa: F401
        from loguru import logger
    except ImportError as error:
        raise InputError(f"Evaluation requires the extra `eval` and lmms-eval ({error}): {INSTALL}") from error
    if not debug:
        logger.remove()


def _describe_tasks() -> str:
    """List the tasks for `--help`."""
    from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS

    lines = []
    for title, names in (("tasks:", BENCHMARKS), ("variants, which are not in `all`:", VARIANTS)):
        text = textwrap.fill(", ".join(names), LINE, initial_indent="  ", subsequent_indent="  ")
        lines += [title, text]
    return "\n".join(lines)


def _check_data(names: list[str], data_root: Path | None, as_json: bool) -> int:
    from fusion_hf.evaluation.benchmark_data import check_data

    problems = check_data(names, data_root)
    if as_json:
        content = {name: [str(problem) for problem in problems if problem.benchmark == name] for name in names}
        sys.stdout.write(json_bytes({"fine": not problems, "problems": content}, indent=2).decode())
        return FAILED if problems else 0
    broken = {problem.benchmark for problem in problems}
    for name in names:
        if name not in broken:
            sys.stdout.write(f"{name}: all there\n")
    for problem in problems:
        sys.stdout.write(f"{printable(str(problem))}\n")
    return FAILED if problems else 0


def _describe(record: "RunRecord", path: Path, table: Path) -> dict[str, Any]:
    """Describe a run for `--json`."""
    return {"record": str(path), "table": str(table), "tasks": [asdict(task) for task in record.tasks]}


def _report(record: "RunRecord") -> None:
    for task in record.tasks:
        for metric in task.metrics:
            error = "" if metric.standard_error is None else f" ± {metric.standard_error:.4f}"
            sys.stdout.write(f"{task.task} {metric.metric}: {metric.value:.4f}{error} ({task.n} questions)\n")
        if task.submission is not None:
            sys.stdout.write(f"{task.task}: {task.status} ({task.n} answers): {task.submission}\n")
    for task in record.failed:
        sys.stderr.write(f"error: {task.task} is not scored: {one_line(task.reason or '')}\n")
