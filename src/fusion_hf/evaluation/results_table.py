"""Write the results of runs as a Markdown table in the layout of the published one, next to the published numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.benchmarks import AUTHORS, BENCHMARKS, Benchmark, find_benchmark
from fusion_hf.evaluation.run_record import FAILED, ModelRecord, RunRecord, TaskRecord
from fusion_hf.hub.family import PublishedRow, published_rows

NOTHING = "—"  # for cells without a value
DECIMALS = 1  # as in the published table


@dataclass(frozen=True)
class _Done:
    """A task and its run."""

    task: TaskRecord
    run: RunRecord

    @property
    def benchmark(self) -> Benchmark:
        return find_benchmark(self.task.task)

    @property
    def figures(self) -> list[float]:
        """Results in the unit of the table, one per metric of the benchmark. Empty if the task is not scored."""
        values = {metric.metric: metric.value for metric in self.task.metrics}
        wanted = self.benchmark.metrics if values else ()
        return [round(values[metric] * self.benchmark.scale, DECIMALS) for metric in wanted]

    @property
    def note(self) -> str:
        """What differs from a full run with the authors' prompt and no judge. Empty if nothing does."""
        parts = []
        if self.task.status == FAILED:
            parts.append(f"failed: {self.task.reason}")
        if self.task.n < self.task.n_total:
            parts.append(f"{self.task.n} of {self.task.n_total} questions")
        if self.run.prompts != AUTHORS and self.benchmark.authors_task is not None:
            parts.append(f"prompt of {self.run.prompts}, not the authors'")
        if self.task.judge is not None:
            parts.append(f"judged by {self.task.judge}")
        return "; ".join(parts)


def find_published(name: str) -> PublishedRow:
    """
    Return a row of the published table.

    Args:
        name: the name of the row.

    Raises:
        InputError: if there is no such row.
    """
    rows = published_rows()
    if name not in rows:
        raise InputError(f"--published must be one of {', '.join(rows)}, got {name!r}.")
    return rows[name]


def make_table(records: Sequence[RunRecord], published: str | None = None, peers: bool = False) -> str:
    """
    Write one table of one or several runs of a model. If several runs have a task, the last one counts.

    Args:
        records: the records, at least one.
        published: the name of the published row to compare with. None chooses the one with the sizes of the model, if
            any.
        peers: whether to show other published models of this size, or all of them if there is no row to compare with.

    Raises:
        InputError: if the records belong to several models, or a name is unknown.
    """
    _check_one_model(records)
    model = records[-1].model
    name = model.published if published is None else published
    row = None if name is None else find_published(name)
    done = {task.task: _Done(task, run) for run in records for task in run.tasks}
    in_table = [done[name] for name, benchmark in BENCHMARKS.items() if name in done and benchmark.columns]
    beside = [one for one in done.values() if not one.benchmark.columns]
    notes = [one for one in in_table if one.note]
    parts = [
        _grid(_rows(model, row, peers, in_table, notes)),
        *([_lines(f"[{place}] `{one.task.task}`: {one.note}" for place, one in enumerate(notes, 1))] if notes else []),
        *([_lines(_beside(one) for one in beside)] if beside else []),
        _about(model, row, published is None),
    ]
    return "\n\n".join(parts) + "\n"


def _check_one_model(records: Sequence[RunRecord]) -> None:
    first = records[0].model
    for record in records[1:]:
        for name in ("revision", "dtype", "query_len", "image_token_grid"):
            own, other = vars(first)[name], vars(record.model)[name]
            if own != other:
                raise InputError(f"All records must have the same {name}, got {own!r} and {other!r}.")


def _rows(
    model: ModelRecord, row: PublishedRow | None, peers: bool, in_table: list[_Done], notes: list[_Done]
) -> Iterator[list[str]]:
    columns = [column for benchmark in BENCHMARKS.values() for column in benchmark.columns]
    yield ["model", "vision tokens", *columns]
    if peers:
        for peer in published_rows().values():
            if peer is not row and (row is None or peer.group == row.group):
                yield _published_cells(peer, columns)
    ours, differences = {}, {}
    for one in in_table:
        mark = f" [{notes.index(one) + 1}]" if one in notes else ""
        for column in one.benchmark.columns:
            ours[column] = f"{one.task.status}{mark}"
        for column, figure in zip(one.benchmark.columns, one.figures, strict=False):
            ours[column] = f"{figure:.{DECIMALS}f}{mark}"
            theirs = None if row is None else row.values[column]
            if theirs is not None:
                differences[column] = f"{_difference(figure, theirs)}{mark}"
    if row is not None:
        yield _published_cells(row, columns, ", published")
    yield [f"{model.name}, measured", NOTHING, *(ours.get(column, NOTHING) for column in columns)]
    if row is not None:
        yield ["difference", NOTHING, *(differences.get(column, NOTHING) for column in columns)]


def _published_cells(row: PublishedRow, columns: list[str], suffix: str = "") -> list[str]:
    cells = [row.vision_tokens, *(row.values[column] for column in columns)]
    return [f"{row.name}{suffix}", *(NOTHING if cell is None else str(cell) for cell in cells)]


def _difference(ours: float, theirs: float) -> str:
    """Return the difference of the numbers as they are printed, never "-0.0"."""
    return f"{round(ours - theirs, DECIMALS) + 0.0:+.{DECIMALS}f}"


def _grid(rows: Iterator[list[str]]) -> str:
    header, *others = [[_escape(cell) for cell in row] for row in rows]
    ruler = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *others))


def _lines(texts: Iterator[str]) -> str:
    return "\n".join(f"- {_escape(text)}" for text in texts)


def _beside(one: _Done) -> str:
    """Describe a task that has no column."""
    task = one.task
    if task.submission is not None:
        return f"`{task.task}`: {task.status}, {task.n} answers in {task.submission}, no score"
    names = [metric.partition(",")[0] for metric in one.benchmark.metrics]
    figures = [f"{name} {figure:.{DECIMALS}f}" for name, figure in zip(names, one.figures, strict=False)]
    return f"`{task.task}`: " + "; ".join([*figures, *([one.note] if one.note else [])])


def _about(model: ModelRecord, row: PublishedRow | None, is_recognised: bool) -> str:
    place = "" if model.url is None else f" at {model.url}"
    texts = [f"Measured: {model.name} ({model.revision}){place}, {model.dtype} on {model.device}, {_budget(model)}."]
    if row is None:
        texts.append("No published model has these sizes. Choose a row to compare with by `--published NAME`.")
    elif is_recognised:
        texts.append(f"Published: {row.name}, which has the sizes of this model.")
    else:
        texts.append(f"Published: {row.name}, as requested.")
    return _escape("\n".join(texts))


def _budget(model: ModelRecord) -> str:
    if model.image_token_grid is None or model.query_len is None:
        return "with the image tokens and latents of its server"
    return f"{model.image_token_grid**2} image tokens, {model.query_len} latents"


def _escape(text: str) -> str:
    """Remove what Markdown would interpret as cells or HTML."""
    return text.replace("|", r"\|").replace("<", "&lt;")
