"""Records are measured without a look at their images, and grouped as they would be with one."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage
from torch.utils.data import ConcatDataset, Subset

from fusion_hf.training import record_lengths
from fusion_hf.training.query_len_records import QueryLenRecords, with_query_lens
from fusion_hf.training.record_lengths import measure_records

WORDS = ["one", "one two", "one two three"]
QUESTION = "<image> what is it ?"


def turns(number: int, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": WORDS[number % 3]}]


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "red.png"
    PillowImage.new("RGB", (8, 8), "red").save(path)
    return [None if number % 3 == 1 else str(path) for number in range(12)]


@pytest.fixture
def tables(images):
    """The same records with an image in each place where the library datasets can decode one."""
    chat = [turns(number, "what is it ?" if path is None else QUESTION) for number, path in enumerate(images)]
    message = {"role": Value("string"), "content": Value("string")}
    block = {"type": Value("string"), "text": Value("string"), "image": Image()}
    blocks = [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "what is it ?", "image": None}]
                + ([] if path is None else [{"type": "image", "text": None, "image": path}]),
            },
            {"role": "assistant", "content": [{"type": "text", "text": WORDS[number % 3], "image": None}]},
        ]
        for number, path in enumerate(images)
    ]
    nested = {"role": Value("string"), "content": List(block)}
    return {
        "column": Dataset.from_dict(
            {"image": images, "messages": chat}, Features({"image": Image(), "messages": List(message)})
        ),
        "list": Dataset.from_dict(
            {"images": [[] if path is None else [path] for path in images], "messages": chat},
            Features({"images": List(Image()), "messages": List(message)}),
        ),
        "block": Dataset.from_dict({"messages": blocks}, Features({"messages": List(nested)})),
    }


@pytest.fixture
def no_decoding(monkeypatch):
    """Whatever opens an image fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    def switch_on():
        monkeypatch.setattr(PillowImage, "open", refuse)
        monkeypatch.setattr(Image, "decode_example", refuse)

    return switch_on


@pytest.mark.parametrize("place", ["column", "list", "block"])
@pytest.mark.parametrize("arranged", [False, True], ids=["in order", "shuffled"])
def test_a_table_is_measured_without_decoding(monkeypatch, tables, no_decoding, place, arranged):
    monkeypatch.setattr(record_lengths, "ROWS_AT_A_TIME", 5)
    table = tables[place].shuffle(seed=1) if arranged else tables[place]
    expected = measure_records(list(table))  # decoded, and so opened
    assert len({*map(tuple, expected)}) == 6 - 3, "with an image or without, each with its answer"
    no_decoding()
    records = with_query_lens(table)
    np.testing.assert_array_equal(records.lengths, expected[:, 0])
    np.testing.assert_array_equal(records.turns, expected[:, 1])
    assert records.lengths.dtype == np.int32


def test_a_list_is_measured_without_opening(images, no_decoding):
    no_decoding()
    records = [
        {"messages": turns(number, QUESTION if path else "what ?"), **({"image": path} if path else {})}
        for number, path in enumerate(images)
    ]
    found = measure_records(records)
    assert found[:3].tolist() == [[5, 1], [-4, 1], [7, 1]]


def test_a_transform_of_the_users_is_heard(tables):
    table = tables["column"].with_transform(lambda rows: {"messages": [turns(0, "a b c d")] * len(rows["messages"])})
    assert measure_records(table).tolist() == [[-5, 1]] * 12


def test_parts_of_data_sets_are_measured_as_these(tables, no_decoding):
    whole = measure_records(tables["column"])
    no_decoding()
    parts = ConcatDataset([Subset(tables["column"], [3, 1]), tables["column"]])
    np.testing.assert_array_equal(measure_records(parts), np.concatenate([whole[[3, 1]], whole]))


def test_progress_is_shown(capsys):
    records = [{"messages": turns(number, "what ?")} for number in range(4)]
    assert len(QueryLenRecords(records, show_progress=True).lengths) == 4
    assert "lengths" in capsys.readouterr().err
    assert len(QueryLenRecords(records).lengths) == 4
    assert capsys.readouterr().err == ""
