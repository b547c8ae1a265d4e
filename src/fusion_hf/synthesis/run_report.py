"""The end of a run: its report, the mixtures for training, and the data card."""

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.outputs import json_bytes, write_atomically
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.data_card import write_card
from fusion_hf.synthesis.filtering import filters_of
from fusion_hf.synthesis.run_config import PROCEDURAL, RunFolders, SynthesisConfig
from fusion_hf.synthesis.shards import REJECTED, SUMMARIES, stage_folder
from fusion_hf.synthesis.summary import CategorySummary, Summary

REPORT = "report.json"
DECIMALS = 4  # decimals of shares
BEFORE_RULES, AFTER_RULES = ("describe", "write_qa"), ("duplicate_questions", "judge", "make_image", "image_check")


def idle_steps(config: SynthesisConfig) -> set[str]:
    """
    Return the steps that a run does not have, so that their yield is unknown.

    Args:
        config: the configuration of the run.
    """
    if config.backend == PROCEDURAL:
        return {*BEFORE_RULES, "make_image", "judge", "image_check"}
    return {name for name in ("judge", "image_check") if getattr(config, name) is None}


def yields(summary: CategorySummary, rules: list[str], idle: Container[str] = ()) -> list[dict[str, Any]]:
    """
    Count what each step kept of the records that reached it, in the order of the steps. Steps that rejected nothing
    are included.

    Args:
        summary: the counts of a category.
        rules: the names of the category's filters in order.
        idle: the steps that were not run, which no record reached.

    Returns:
        JSON values. `kept_share` is None if no record reached the step.
    """
    known = [*BEFORE_RULES, *rules, *AFTER_RULES]
    steps = [*known, *sorted(set(summary.rejected) - set(known))]
    found, came = [], summary.records
    for step in steps:
        rejected, ran = summary.rejected[step], step not in idle
        share = round(1 - rejected / came, DECIMALS) if ran and came else None
        found.append({"step": step, "came": came if ran else 0, "rejected": rejected, "ran": ran, "kept_share": share})
        came -= rejected
    return found


def make_report(config: SynthesisConfig, summary: Summary) -> dict[str, Any]:
    """
    Make the report of a run as JSON values: counts, yields, prompts and models. It has no times, so that equal runs
    have equal reports.

    Args:
        config: the configuration of the run.
        summary: the counts of the run.
    """
    known, idle = load_categories(), idle_steps(config)
    categories = {}
    for name, counts in sorted(summary.categories.items()):
        categories[name] = {
            "stage": known[name].stage,
            "records": counts.records,
            "written": counts.written,
            "turns": counts.turns,
            "words": counts.words,
            "answer_letters": dict(sorted(counts.letters.items())),
            "answers": {form: dict(values.most_common()) for form, values in sorted(counts.answers.items())},
            "prompts_sha256": known[name].prompts_hash,
            "yields": yields(counts, [rule.name for rule in filters_of(name)], idle),
            "examples": counts.examples,
        }
    return {
        "records": summary.records,
        "written": summary.written,
        "seed": config.seed,
        "backend": config.backend,
        "license": config.license_name,
        "models": {step: dict(sorted(models.items())) for step, models in sorted(summary.models.items())},
        "usage": {step: dict(sorted(amounts.items())) for step, amounts in sorted(summary.usage.items())},
        "categories": categories,
    }


def write_mixtures(data: Path) -> list[Path]:
    """
    Write a mixture for each training stage that has shards, for the key `data` of a recipe.

    Args:
        data: the folder of the data.

    Returns:
        The paths of the mixtures.
    """
    paths = []
    for stage in sorted({category.stage for category in load_categories().values()}):
        if any((data / stage_folder(stage)).glob("*")):
            content = {"datasets": [{"json_path": stage_folder(stage), "sampling_strategy": "all"}]}
            path = data / f"{stage_folder(stage)}.yaml"
            write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
            paths.append(path)
    return paths


class MakeReport(PipelineStep):
    """
    Add up the counts of all tasks once they are done, and write the report.

    Args:
        config: the configuration of the run.
    """

    name = "Make report"
    type = "Report"

    def __init__(self, config: SynthesisConfig):
        super().__init__()
        self.config = config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        folders, summary = RunFolders(self.config.output), Summary()
        for path in sorted((folders.work / SUMMARIES).glob("*.json")):
            summary.merge(Summary.from_dict(json.loads(path.read_bytes())))
        for path in (folders.data / REJECTED).glob("*"):
            if path.stat().st_size == 0:  # tasks of earlier versions left files without records
                path.unlink()
        report = make_report(self.config, summary)
        write_atomically(folders.data / REPORT, json_bytes(report, indent=1))
        mixtures = write_mixtures(folders.data)
        write_card(folders.data, report, summary, mixtures, self.config.format)
        yield from ()


def table(report: dict[str, Any]) -> str:
    """
    Write the records by category and by rejecting step as a table for a terminal.

    Args:
        report: the report of the run.
    """
    lines = [f"{'category':<20}{'started':>9}{'written':>9}  rejected by"]
    for name, counts in report["categories"].items():
        steps = [f"{step['step']} {step['rejected']:,}" for step in counts["yields"] if step["rejected"]]
        lines.append(f"{name:<20}{counts['records']:>9,}{counts['written']:>9,}  {', '.join(steps) or '-'}")
    lines.append(f"{'total':<20}{report['records']:>9,}{report['written']:>9,}")
    return "\n".join(lines)


def finished_report(data: Path) -> dict[str, Any] | None:
    """
    Read the report of a run, or return None if the run is not finished.

    Args:
        data: the folder of the data.
    """
    path = data / REPORT
    return json.loads(path.read_bytes()) if path.exists() else None
