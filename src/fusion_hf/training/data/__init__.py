"""Records to train on: JSON, JSONL, CSV, Parquet, image folders, tar shards and Hub data sets, alone or mixed."""

from fusion_hf.training.data.dataset import RecordDataset, StreamedRecords, load_records
from fusion_hf.training.data.records import SampleKey

__all__ = ["RecordDataset", "SampleKey", "StreamedRecords", "load_records"]
