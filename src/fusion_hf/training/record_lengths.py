"""How long records are, to put those of about the same length into one step, without opening or decoding an image."""

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

ROWS_AT_A_TIME = 1000  # of a table
PRESENT = "image"  # stands for an image that is there


def measure_records(records: Any, show_progress: bool = False) -> np.ndarray:
    """
    Count the words and the questions of records.

    A data set of your own whose items hold opened images opens them here as well. Nothing is opened for lists, for
    those of the library datasets, for a [`RecordDataset`], and for parts of these.

    Args:
        records: a sequence of records, or a data set.
        show_progress: whether to show a bar.

    Returns:
        Words, negative without an image, and questions of each record: int32 `(num_records, 2)`.
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
    """The same records; those of the library datasets have their images as they are stored."""
    datasets = sys.modules.get("datasets")  # whoever has such a data set has imported it
    is_table = datasets is not None and isinstance(records, datasets.Dataset)
    # a transform of the user's may say anything, so its items are taken
    return _rows(records) if is_table and records.format["type"] is None else records


def _rows(records: Any) -> Iterator[dict[str, Any]]:
    features = copy.deepcopy(records.features)
    for feature in features.values():
        _keep_stored(feature)
    # the bytes of a column of images are not even read
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
    """Switch off the decoding of images in a column's type, however deep."""
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
