"""Records to train on: JSON, JSONL, CSV, Parquet, image folders, tar shards and Hub data sets, alone or mixed."""

from typing import TYPE_CHECKING, Any

from fusion_hf.data.record_parsing import SampleKey

if TYPE_CHECKING:
    from fusion_hf.data.dataset import RecordDataset, StreamedRecords, load_records

__all__ = ["RecordDataset", "SampleKey", "StreamedRecords", "load_records"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # these names need the extra `train`; the shapes of records do not
    from fusion_hf.data import dataset

    return getattr(dataset, name)
