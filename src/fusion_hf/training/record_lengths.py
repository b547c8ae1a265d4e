"""Measure the length of records without opening images, to group records of similar length into a step."""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

from fusion_hf.data import RecordDataset
from fusion_hf.training.collator import images_of, record_to_messages
from fusion_hf.training.exact_match import text_of

ROWS_AT_A_TIME = 1000  # of a data set
PRESENT = "image"  # replaces an existing image


def measure_records(records: Any, show_progress: bool = False) -> np.ndarray:
    """
    Count the words and the questions of records.

    Images stay closed for lists, for data sets of the library datasets, for a [`RecordDataset`], and for subsets of
    these. A data set of your own whose items hold opened images opens them here as well.

    Args:
        records: a sequence of records, or a data set.
        show_progress: whether to show a progress bar.

    Returns:
        An int32 array `(num_records, 2)`: the number of words, negative for records without an image, and the number
            of questions.
    """
    if isinstance(records, RecordDataset):
        return np.stack([records.lengths, records.turns], axis=1)
    if isinstance(records, Subset):
        return measure_records(records.dataset, show_progress)[np.asarray(records.indices, dtype=np.int64)]
    if isinstance(records, ConcatDataset):
        return np.concatenate([measure_records(part, show_progress) for part in records.datasets])
    shown = tqdm(
        _stored(records), desc="lengths", unit="record", total=len(records), disable=not show_progress, leave=False
    )
    counts = (count for record in shown for count in _measure(record))
    return np.fromiter(counts, dtype=np.int32).reshape(-1, 2)


def _measure(record: dict[str, Any]) -> tuple[int, int]:
    messages = record_to_messages(record)
    words = max(1, sum(len(text_of(message["content"]).split()) for message in messages))
    questions = sum(message["role"] == "user" for message in messages)
    return words if images_of(messages) else -words, questions


def _stored(records: Any) -> Any:
    """Return the records such that images of the library datasets stay undecoded."""
    datasets = sys.modules.get("datasets")  # if it is not imported, no records can come from it
    is_table = datasets is not None and isinstance(records, datasets.Dataset)
    # a custom transform may return anything, so it must be applied
    return _rows(records) if is_table and records.format["type"] is None else records


def _rows(records: Any) -> Iterator[dict[str, Any]]:
    features = copy.deepcopy(records.features)
    for feature in features.values():
        _keep_stored(feature)
    # the bytes of image columns are not read
    images = [name for name in records.format["columns"] if hasattr(features[name], "decode")]
    tables = records.with_format("arrow", columns=records.format["columns"])
    for table in tables.iter(batch_size=ROWS_AT_A_TIME):
        present = {name: table.column(name).is_valid().to_pylist() for name in images}
        rest = table.drop_columns(images)
        rows = rest.to_pylist() if rest.num_columns else [{} for _ in range(len(table))]
        for number, row in enumerate(rows):
            marks = {name: PRESENT if valid[number] else None for name, valid in present.items()}
            yield features.decode_example(row) | marks


def _keep_stored(feature: Any) -> None:
    """Disable the decoding of images in the type of a column, at any depth."""
    if isinstance(feature, dict):
        parts = list(feature.values())
    elif isinstance(feature, (list, tuple)):
        parts = list(feature)
    else:
        parts = [feature.feature] if hasattr(feature, "feature") else []
        if hasattr(feature, "decode"):
            feature.decode = False
    for part in parts:
        _keep_stored(part)
