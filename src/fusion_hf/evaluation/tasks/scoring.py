"""Functions of our tasks for scoring and for choosing rows and images, referred to by the YAML files in this
package.
"""

import tempfile
from argparse import Namespace
from typing import Any

import datasets
from lmms_eval.tasks.hallusion_bench.evaluate_hb import hb_aggregation_result_aAcc
from lmms_eval.tasks.mmvp.utils import mmvp_process_results
from PIL import Image

from fusion_hf.evaluation.benchmarks import PERCENT
from fusion_hf.evaluation.tasks.local_rows import local_images

Row = dict[str, Any]
# maps `Index` to the label as MMVP was first published. lmms-lab-eval/MMVP has the other of the two labels.
MMVP_ORIGINAL_LABELS = {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}
SEED_IMAGE = "image"  # `data_type` of questions about a single image


def mmvp_original_labels(doc: Row, results: list[str]) -> dict[str, Any]:
    """Score with lmms-eval, using the labels that the authors had, whatever the data holds."""
    label = MMVP_ORIGINAL_LABELS.get(doc["Index"], doc["Correct Answer"])
    return mmvp_process_results({**doc, "Correct Answer": label}, results)


def mmmu_first_image(doc: Row) -> list[Image.Image]:
    """Return the first image of a question, since FUSION reads one image and the authors' adapter did the same."""
    return [doc["image_1"].convert("RGB")]


def mmbench_cn_without_judge(results: list[Row], args: Namespace) -> float:
    """
    Return the percentage of questions answered right in all orders of their options. Answers without a letter
    are wrong.
    """
    # imported here, since it reads the environment, which other tasks may change
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    accuracy, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return PERCENT * accuracy


def seed_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """Select the questions about a single image."""
    chosen = [row for row, kind in enumerate(dataset["data_type"]) if kind == SEED_IMAGE]
    return local_images(dataset.select(chosen))


def mathvista_whole_precision(doc: Row, results: list[str]) -> dict[str, Any]:
    """
    Score with lmms-eval and an integer number of decimals. With 1.0, as in the data, no decimal answer would be
    right.
    """
    from lmms_eval.tasks.mathvista.utils import mathvista_process_results  # the import requires the key of a judge

    return mathvista_process_results({**doc, "precision": int(doc["precision"] or 0)}, results)


def mathvista_accuracy(results: list[Row], args: Namespace) -> float:
    """Return the percentage of right answers."""
    from lmms_eval.tasks.mathvista.utils import mathvista_aggregate_results

    accuracy = mathvista_aggregate_results(results, args)
    return 0.0 if accuracy is None else accuracy


def hallusion_accuracy(results: list[Row], args: Namespace) -> float:
    """Return the percentage of questions answered right."""
    with tempfile.TemporaryDirectory() as folder:
        return hb_aggregation_result_aAcc(results, Namespace(output_path=folder))


def ocrbench_accuracy(results: list[Row], args: Namespace) -> float:
    """Return the share of right answers. lmms-eval's function adds up all runs of a process and divides by 1000."""
    return sum(result["score"] for result in results) / len(results)
