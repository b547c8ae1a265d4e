"""`fusion-hf evaluate`: published benchmarks, through lmms-eval."""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import AUTO, DTYPES, device, positive
from fusion_hf.cli.model_options import find_model, make_options
from fusion_hf.cli.terminal import FAILED, one_line, printable
from fusion_hf.common.endpoints import check_key
from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import check_place, write_atomically

if TYPE_CHECKING:
    from fusion_hf.evaluation.run_record import RunRecord

ALL = "all"
BATCH_SIZE = 8
PROMPTS = ("authors", "lmms-eval")
OUTPUT = "evaluation"
INSTALL = "pip install 'fusion_hf[eval,train]' && pip install --no-deps lmms-eval==0.7.3"


def add_parser(commands: Any) -> None:
    """Tell the command line about `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a model on published benchmarks",
        description="Measure a model on published benchmarks, in one process or under `accelerate launch`. A run that "
        "was killed goes on with the same command. Exit status: 0 all tasks are scored, or their answers written "
        "for a server, 1 a task failed, 2 wrong input.",
    )
    parser.add_argument("--tasks", metavar="all|NAME,...", help="names of benchmarks, by commas")
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", help="a model folder or a Hub repository; default: the bundled fusion-nano"
    )
    parser.add_argument(
        "--url", metavar="ADDRESS", help="ask a server of the OpenAI protocol instead; --model is then a name it has"
    )
    parser.add_argument("--api-key-env", metavar="NAME", help="with --url: environment variable with the server's key")
    parser.add_argument(
        "--concurrency",
        dest="parallel",
        type=positive,
        metavar="N",
        help="with --url: requests in flight; default: 4",
    )
    parser.add_argument("--data-root", metavar="DIR", help="local copies of the data, a folder for each benchmark")
    parser.add_argument("--prompts", choices=PROMPTS, default=PROMPTS[0], help="whose prompts; default: %(default)s")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first questions of each task: a try")
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"questions answered together; default: {BATCH_SIZE}",
    )
    parser.add_argument("--output", default=OUTPUT, metavar="DIR", help="of answers, records; default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="only say what is missing of the data")
    parser.add_argument(
        "--published", metavar="NAME", help="published row to compare with; default: the one whose sizes the model has"
    )
    parser.add_argument("--peers", action="store_true", help="show the other published models of this size as well")
    parser.add_argument(
        "--table", nargs="+", metavar="RECORD.json", help="only make one table of several runs of a model"
    )
    parser.add_argument("--device", type=device, default=AUTO, help="cpu, cuda, mps or auto; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=AUTO, help="type of the weights; default: %(default)s")
    parser.add_argument(
        "--debug", action="store_true", help="show where an error comes from, and the libraries' notes"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, check the data or make a table; returns the exit status."""
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
        raise InputError(f"--data-root is {arguments.data_root}; allowed: a folder.")
    if arguments.dry_run:
        return _check_data(names, data_root)
    if arguments.limit is not None:
        _check_limit(names)
    check_key(arguments.api_key_env, "--api-key-env")
    check_place(Path(arguments.output), "--output")
    if arguments.url is None:
        find_model(arguments)
    if find_spec("lmms_eval") is None:
        raise InputError(f"Evaluation needs the extra `eval` and lmms-eval, which is not installed: {INSTALL}")
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
        _report(record)
        table = path.with_suffix(".md")
        write_atomically(table, make_table([record], arguments.published, arguments.peers).encode())
        sys.stdout.write(f"{path}\n{table}\n")
    return FAILED if record.failed else 0


def _make_table(arguments: argparse.Namespace) -> int:
    from fusion_hf.evaluation.results_table import make_table
    from fusion_hf.evaluation.run_record import RunRecord

    if arguments.tasks is not None:
        raise InputError("--table runs nothing; leave out --tasks, or run the tasks first.")
    records = [RunRecord.read(Path(path)) for path in arguments.table]
    sys.stdout.write(make_table(records, arguments.published, arguments.peers))
    return 0


def _task_names(given: str | None) -> list[str]:
    """The benchmarks asked for; an InputError for a name that is no benchmark's, or if there is none."""
    from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS

    known = (*BENCHMARKS, *VARIANTS)
    if given is None:
        raise InputError(f"--tasks is missing; allowed: {ALL}, {', '.join(known)}.")
    if given == ALL:
        return list(BENCHMARKS)
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in known:
            raise InputError(f"--tasks has {name!r}; allowed: {ALL}, {', '.join(known)}.")
    return names


def _check_place(arguments: argparse.Namespace) -> None:
    """Refuse an option of the other place where answers can be made, this process or a server."""
    if arguments.url is None:
        for option, value in (("--api-key-env", arguments.api_key_env), ("--concurrency", arguments.parallel)):
            if value is not None:
                raise InputError(f"{option} is {value}; allowed only with --url: nobody else is asked.")
        return
    for option, value, default, instead in (
        ("--device", arguments.device, AUTO, "the server has chosen it"),
        ("--dtype", arguments.dtype, AUTO, "the server has chosen it"),
        (
            "--batch-size",
            arguments.batch_size,
            None,
            "--concurrency says how many questions are asked at once",
        ),
    ):
        if value != default:
            raise InputError(f"{option} is {value}; not allowed with --url: {instead}.")


def _check_limit(names: list[str]) -> None:
    """Refuse a limit if a task is answered for a server, which takes nothing but all answers."""
    from fusion_hf.evaluation.benchmarks import find_benchmark

    for name in names:
        if find_benchmark(name).is_submitted:
            raise InputError(f"--limit is given, and the server of {name} takes all answers; leave out one of them.")


def _require_lmms_eval(debug: bool) -> None:
    """Import lmms-eval; an InputError if it is not installed, or something that it needs."""
    from fusion_hf.cli.model_loading import silence_libraries

    if not debug:
        silence_libraries()
    try:
        import httpx  # noqa: F401
        import lmms_eval.evaluator  # noqa: F401
        from loguru import logger
    except ImportError as error:
        raise InputError(f"Evaluation needs the extra `eval` and lmms-eval ({error}): {INSTALL}") from error
    if not debug:
        logger.remove()


def _check_data(names: list[str], data_root: Path | None) -> int:
    from fusion_hf.evaluation.benchmark_data import check_data

    problems = check_data(names, data_root)
    broken = {problem.benchmark for problem in problems}
    for name in names:
        if name not in broken:
            sys.stdout.write(f"{name}: all there\n")
    for problem in problems:
        sys.stdout.write(f"{printable(str(problem))}\n")
    return FAILED if problems else 0


def _report(record: "RunRecord") -> None:
    for task in record.tasks:
        for metric in task.metrics:
            error = "" if metric.standard_error is None else f" ± {metric.standard_error:.4f}"
            sys.stdout.write(f"{task.task} {metric.metric}: {metric.value:.4f}{error} ({task.n} questions)\n")
        if task.submission is not None:
            sys.stdout.write(f"{task.task}: {task.status} ({task.n} answers): {task.submission}\n")
    for task in record.failed:
        sys.stderr.write(f"error: {task.task} is not scored: {one_line(task.reason or '')}\n")
