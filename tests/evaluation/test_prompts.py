"""The authors' prompts to the letter, without lmms-eval."""

import re

import pytest
from tests.evaluation.rows import ROWS, recorded_prompts

from fusion_hf.evaluation.benchmark_data import AUTHORS, OWN_TASKS, find_benchmark, folder_of
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS
from fusion_hf.evaluation.tasks import authors_prompts as prompts

EASY_VQA = "easy_vqa"
VARIED = [
    name for name, one in {**BENCHMARKS, **VARIANTS}.items() if one.authors_task and one.metrics and name != EASY_VQA
]


def prompt_function(authors_task: str):
    """What the task's YAML file names."""
    text = (OWN_TASKS / "authors" / f"{authors_task}.yaml").read_text(encoding="utf-8")
    module = re.escape(prompts.__name__)
    return vars(prompts)[re.search(rf"^doc_to_text: !function {module}\.(\w+)$", text, re.M)[1]]


@pytest.mark.parametrize("name", VARIED)
def test_prompt_is_the_recorded_one(name: str):
    benchmark = find_benchmark(name)
    text = prompt_function(benchmark.authors_task)(ROWS[folder_of(benchmark)][0])
    assert ["<image>", text] == recorded_prompts()[AUTHORS][name]


def test_every_task_file_of_the_authors_is_a_benchmarks():
    files = {path.stem for path in (OWN_TASKS / "authors").glob("*.yaml")}
    assert files == {find_benchmark(name).authors_task for name in VARIED}


@pytest.mark.parametrize("empty", [None, "nan", float("nan"), ""])
def test_mmbench_without_a_hint_begins_with_the_question(empty):
    row = {**ROWS["mmbench_en"][0], "hint": empty}
    assert prompts.mmbench_en(row).startswith(f"{row['question']}\nA. ")


def test_mmbench_ends_its_options_at_the_first_empty_one():
    row = {**ROWS["mmbench_cn"][0], "C": "nan"}
    assert "C. " not in prompts.mmbench_cn(row)
    assert "D. " not in prompts.mmbench_cn(row)


def test_mmmu_without_options_asks_for_a_word():
    assert prompts.mmmu(ROWS["mmmu_val"][1]).endswith(f"\n\n{prompts.WORD}")
