"""Run benchmarks in one or several processes, and make sure that no failure is counted as a wrong answer."""

import argparse
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lmms_eval.evaluator import evaluate

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.answer_cache import AnswerCache
from fusion_hf.evaluation.answering import RequestAnswerer
from fusion_hf.evaluation.benchmark_data import PreparedTask, check_data, load_task, prepare_tasks, silence
from fusion_hf.evaluation.judges import JudgeWatch, address_of, check_judge
from fusion_hf.evaluation.lmms_adapter import FusionChat, RequestsFailed, own_device
from fusion_hf.evaluation.local import LocalModel
from fusion_hf.evaluation.processes import ALONE, Processes, environment
from fusion_hf.evaluation.question_scores import keep_results, score_questions
from fusion_hf.evaluation.run_record import FAILED, SCORED, SUBMITTED, TIME, RunRecord, TaskRecord, read_metrics
from fusion_hf.evaluation.sample_log import AskedQuestion, make_samples, samples_file, write_samples
from fusion_hf.evaluation.served import PARALLEL, ServedModel
from fusion_hf.evaluation.submissions import submission_file, write_submission

# lmms-eval's default seeds, since some tasks guess if an answer names no option
PYTHON_SEED, SEED = 0, 1234
ANSWERS, TASKS, SUBMISSIONS, SAMPLES = "answers", "tasks", "submissions", "samples"  # subfolders of a run


T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of a run; see `fusion-hf evaluate --help`."""

    tasks: Sequence[str]
    output: Path
    model: str | None = None
    data_root: Path | None = None
    prompts: str = "authors"
    limit: int | None = None
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    url: str | None = None
    api_key_env: str | None = None
    parallel: int | None = None
    command: Sequence[str] = ()
    debug: bool = False


def run(options: EvaluationOptions) -> RunRecord:
    """
    Answer tasks one after the other, and score them or write their answers to a file. The record lists what failed.

    Args:
        options: the options of the run.

    Returns:
        The record.

    Raises:
        InputError: if the model cannot be loaded or asked, or another run uses the output folder.
    """
    processes = Processes.start()
    model = _open_model(options)
    cache = AnswerCache(options.output / ANSWERS, processes.rank)
    answerer = RequestAnswerer(model, cache, progress=processes.rank == 0)
    samples = f"{SAMPLES}/{datetime.now(timezone.utc).strftime(TIME)}"
    record = _begin_record(options, model, processes, samples)
    try:
        for name in options.tasks:
            record.tasks.append(_Evaluation(options, processes, answerer, name, options.output / samples).record())
    finally:
        cache.close()
    processes.end()
    return record


def _open_model(options: EvaluationOptions) -> LocalModel | ServedModel:
    if options.url is None:
        return LocalModel.load(options.model, own_device(options.device), options.dtype, batch_size=options.batch_size)
    parallel = PARALLEL if options.parallel is None else options.parallel
    return ServedModel.connect(options.url, options.model, options.api_key_env, parallel=parallel)


def _begin_record(
    options: EvaluationOptions, model: LocalModel | ServedModel, processes: Processes, samples: str
) -> RunRecord:
    return RunRecord(
        command=list(options.command),
        model=model.describe(),
        prompts=options.prompts,
        limit=options.limit,
        batch_size=options.batch_size,
        processes=processes.count,
        parallel=model.parallel if isinstance(model, ServedModel) else None,
        data_root=None if options.data_root is None else str(options.data_root),
        samples=samples,
    )


class _Evaluation:
    """One task. The first process prepares and scores it, and all processes answer it."""

    def __init__(
        self, options: EvaluationOptions, processes: Processes, answerer: RequestAnswerer, name: str, samples: Path
    ):
        self.options = options
        self.processes = processes
        self.answerer = answerer
        self.name = name
        self.samples = samples
        self.lmms_task = name  # replaced when lmms-eval's name is known
        self.first_failure = len(answerer.failures)

    def record(self) -> TaskRecord:
        """Evaluate the task and return its record in all processes."""
        try:
            with nullcontext() if self.options.debug else silence():
                done = self._evaluate()
        except Exception as error:  # the other tasks continue after any error
            if self.options.debug:
                raise
            done = self._failed(error)
        return self.processes.gather(done)[0]

    def _failed(self, error: Exception) -> TaskRecord:
        failures = error.failures if isinstance(error, RequestsFailed) else []
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return TaskRecord(
            self.name, self.lmms_task, FAILED, reason=reason, failures=tuple(str(failure) for failure in failures)
        )

    def _evaluate(self) -> TaskRecord:
        prepared = self._in_first(self._prepare)
        self.lmms_task = prepared.task_name
        model = FusionChat.around(self.answerer)
        with address_of(prepared.benchmark.judge):
            task_dict = self._in_all(lambda: self._load(prepared, model))
            if self.processes.count > 1:
                self._in_all(lambda: self._answer_share(model, task_dict[prepared.task_name]))
            return self._in_first(lambda: self._finish(prepared, model, task_dict))

    def _finish(self, prepared: PreparedTask, model: FusionChat, task_dict: dict[str, Any]) -> TaskRecord:
        """
        Score the answers of all processes, or write them to a file for a server. Missing answers are computed
        first.
        """
        if self.answerer.cache is not None:
            self.answerer.cache.reload()
        finish = self._submit if prepared.benchmark.is_submitted else self._score
        record = finish(prepared, model, task_dict)
        return replace(record, prompt_sha256=self._hash_prompts(prepared.task_name))

    def _in_all(self, step: Callable[[], T]) -> T:
        """Run a step in all processes. An error in one of them ends the task in all."""
        results, error = self._attempt(step)
        self._agree(error)
        return results[0]

    def _in_first(self, step: Callable[[], T]) -> T:
        """Run a step in the first process, and return its result or end the task in all processes."""
        results, error = self._attempt(step) if self.processes.rank == 0 else ([], None)
        self._agree(error)
        return self.processes.gather(results)[0][0]

    def _attempt(self, step: Callable[[], T]) -> tuple[list[T], Exception | None]:
        """Return the result of a step as the only entry of a list, or an empty list and the error."""
        try:
            return [step()], None
        except Exception as error:  # `_agree` raises it when all processes know
            if self.options.debug and self.processes.count == 1:
                raise
            return [], error

    def _agree(self, error: Exception | None) -> None:
        """Raise the error of this process or of another one."""
        told = None if error is None else self._failed(error)
        first = next((one for one in self.processes.gather(told) if one is not None), None)
        if error is not None:
            raise error
        if first is not None:
            raise RuntimeError(f"in another process: {first.reason}")

    def _prepare(self) -> PreparedTask:
        """Write the task for lmms-eval. Raise an InputError if there is no judge or no data."""
        folder = self.options.output / TASKS
        folder.mkdir(parents=True, exist_ok=True)
        if problems := check_data([self.name], self.options.data_root):
            raise InputError("; ".join(str(problem) for problem in problems))
        (prepared,) = prepare_tasks([self.name], self.options.prompts, self.options.data_root, folder)
        if prepared.benchmark.judge is not None:
            check_judge(prepared.benchmark.judge)
        if prepared.benchmark.is_submitted:  # the file of an earlier run must not be mistaken for this run's
            submission_file(prepared.benchmark, self._submissions).unlink(missing_ok=True)
        return prepared

    def _load(self, prepared: PreparedTask, model: FusionChat) -> dict[str, Any]:
        """Load the task and set it up as lmms-eval's `simple_evaluate` does."""
        task = load_task(prepared)
        model.task_dict[prepared.task_name] = task.dataset
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
        return {prepared.task_name: task}

    def _answer_share(self, model: FusionChat, task: Any) -> None:
        """
        Answer this process's part of the requests, in whole windows, so that requests about one image stay
        together.
        """
        task.build_all_requests(limit=self.options.limit, rank=0, world_size=1)
        requests = model.translate(task.instances)
        window = self.answerer.model.window
        windows = [requests[begin : begin + window] for begin in range(0, len(requests), window)]
        share = windows[self.processes.rank :: self.processes.count]
        self.answerer.answer([request for part in share for request in part])
        if failures := self.answerer.failures[self.first_failure :]:
            raise RequestsFailed(failures)

    @property
    def _submissions(self) -> Path:
        return self.options.output / SUBMISSIONS

    def _score(self, prepared: PreparedTask, model: FusionChat, task_dict: dict[str, Any]) -> TaskRecord:
        """Score the answers with lmms-eval."""
        random.seed(PYTHON_SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        folder = str(self._submissions)
        arguments = argparse.Namespace(output_path=folder, process_with_media=False, reasoning_tags=None)
        task = task_dict[prepared.task_name]
        kept = keep_results(task)
        with environment(ALONE), JudgeWatch():
            results = evaluate(
                lm=model, task_dict=task_dict, limit=self.options.limit, log_samples=True, cli_args=arguments
            )
        scored = score_questions(
            results["samples"][prepared.task_name],
            kept,
            task.aggregation(),
            [metric.partition(",")[0] for metric in prepared.benchmark.metrics],
        )
        write_samples(samples_file(self.samples, self.name), make_samples(scored, self._asked(prepared.task_name)))
        metrics = read_metrics(results["results"][prepared.task_name])
        names = {metric.metric for metric in metrics}
        absent = [metric for metric in prepared.benchmark.metrics if metric not in names]
        if absent:
            raise ValueError(f"lmms-eval must return the metric {absent[0]}, got only {', '.join(sorted(names))}.")
        n = results["n-samples"][prepared.task_name]
        judge = prepared.benchmark.judge
        return TaskRecord(
            self.name,
            prepared.task_name,
            SCORED,
            n=n["effective"],
            n_total=n["original"],
            metrics=metrics,
            judge=None if judge is None else judge.asked(os.environ),
        )

    def _submit(self, prepared: PreparedTask, model: FusionChat, task_dict: dict[str, Any]) -> TaskRecord:
        """Write the answers to a file for a server."""
        task = task_dict[prepared.task_name]
        task.build_all_requests(limit=self.options.limit, rank=0, world_size=1)
        answers = model.generate_until(task.instances)
        docs = task.eval_docs_no_media
        rows = [
            task.process_results(docs[request.doc_id], [answer])["submission"]
            for request, answer in zip(task.instances, answers, strict=True)
        ]
        path = write_submission(prepared.benchmark, rows, len(docs), self._submissions)
        return TaskRecord(
            self.name,
            prepared.task_name,
            SUBMITTED,
            n=len(rows),
            n_total=len(docs),
            submission=path.relative_to(self.options.output).as_posix(),
        )

    def _hash_prompts(self, task_name: str) -> str:
        """Hash all prompts of the task, in the order of its questions."""
        digest = hashlib.sha256()
        own = self._asked(task_name)
        for doc in sorted(own):
            for text in dict.fromkeys(
                asked.prompt for asked in own[doc]
            ):  # once, even if several processes have read it
                digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()

    def _asked(self, task_name: str) -> dict[int, list[AskedQuestion]]:
        """Return how the questions of the task were asked, by number."""
        return {doc: asked for (task, doc), asked in self.answerer.prompts.items() if task == task_name}
