"""What tasks show and count where it is not what lmms-eval's tasks do; named by the YAML files beside this one."""

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
# `Index` -> label as MMVP was first published. lmms-lab-eval/MMVP has the other one of the two.
MMVP_ORIGINAL_LABELS = {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}
SEED_IMAGE = "image"  # `data_type` of questions about one image


def mmvp_original_labels(doc: Row, results: list[str]) -> dict[str, Any]:
    """lmms-eval's scoring with the labels that the authors had, whichever the data hold."""
    label = MMVP_ORIGINAL_LABELS.get(doc["Index"], doc["Correct Answer"])
    return mmvp_process_results({**doc, "Correct Answer": label}, results)


def mmmu_first_image(doc: Row) -> list[Image.Image]:
    """FUSION reads one image: where a question has several, the authors' adapter showed the first."""
    return [doc["image_1"].convert("RGB")]


def mmbench_cn_without_judge(results: list[Row], args: Namespace) -> float:
    """Percent of questions that are answered right in all orders of their options; no letter is a wrong answer."""
    # imported here: it reads the environment, and another task may want it in another state
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    accuracy, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return PERCENT * accuracy


def seed_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """Choose the questions about one image."""
    chosen = [row for row, kind in enumerate(dataset["data_type"]) if kind == SEED_IMAGE]
    return local_images(dataset.select(chosen))


def mathvista_whole_precision(doc: Row, results: list[str]) -> dict[str, Any]:
    """lmms-eval's scoring with the number of decimals as an integer: where the data have 1.0, no decimal is right."""
    from lmms_eval.tasks.mathvista.utils import mathvista_process_results  # which wants a judge's key

    return mathvista_process_results({**doc, "precision": int(doc["precision"] or 0)}, results)


def mathvista_accuracy(results: list[Row], args: Namespace) -> float:
    """Percent."""
    from lmms_eval.tasks.mathvista.utils import mathvista_aggregate_results

    accuracy = mathvista_aggregate_results(results, args)
    return 0.0 if accuracy is None else accuracy


def hallusion_accuracy(results: list[Row], args: Namespace) -> float:
    """Percent of questions that are answered right."""
    with tempfile.TemporaryDirectory() as folder:
        return hb_aggregation_result_aAcc(results, Namespace(output_path=folder))


def ocrbench_accuracy(results: list[Row], args: Namespace) -> float:
    """Share of right answers. lmms-eval's adds up the answers of all runs in a process and divides them by 1000."""
    return sum(result["score"] for result in results) / len(results)
