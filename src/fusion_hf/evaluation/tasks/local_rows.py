"""Local rows with embedded images. Paths and addresses in the data are never opened."""

from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.compute as pc

BYTES, PATH = "bytes", "path"
IMAGE_TYPE = pa.struct([(BYTES, pa.binary()), (PATH, pa.string())])  # the storage type of `datasets.Image`


def is_image(kind: pa.DataType) -> bool:
    """
    Return whether a column holds encoded images.

    Args:
        kind: the type of the column.
    """
    if not pa.types.is_struct(kind):
        return False
    names = {kind.field(place).name for place in range(kind.num_fields)}
    return names == {BYTES, PATH}


def is_list(kind: pa.DataType) -> bool:
    """
    Return whether a column holds lists.

    Args:
        kind: the type of the column.
    """
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def local_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """
    Decode image columns from embedded bytes only, whatever the files say about decoding.

    Args:
        dataset: the data set.
    """
    columns, features = {}, {}
    for name, column in zip(dataset.data.column_names, dataset.data.columns, strict=True):
        if is_image(column.type):
            column = _each(column, _without_path)
            features[name] = datasets.Image()
        elif is_list(column.type) and is_image(column.type.value_type):
            column = _each(column, _lists_without_path)
            features[name] = datasets.List(datasets.Image())
        columns[name] = column
    table = pa.table(columns)
    plain = datasets.Features.from_arrow_schema(table.schema)
    info = datasets.DatasetInfo(features=datasets.Features({**plain, **features}))
    wrapped = datasets.table.InMemoryTable(table)  # the pages remain those of the memory-mapped file
    return datasets.Dataset(wrapped, info=info, split=dataset.split, fingerprint=uuid4().hex)


def _each(column: pa.ChunkedArray, change) -> pa.ChunkedArray:
    chunks = [change(chunk) for chunk in column.chunks]
    return pa.chunked_array(chunks) if chunks else column


def _without_path(images: pa.StructArray) -> pa.StructArray:
    """
    Remove the paths of images. Opening an image without bytes is then an error, and a row without an image keeps
    none.
    """
    encoded = images.field(BYTES).cast(pa.binary())
    paths = pa.nulls(len(images), pa.string())
    return pa.StructArray.from_arrays([encoded, paths], fields=list(IMAGE_TYPE), mask=images.is_null())


def _lists_without_path(lists: pa.ListArray) -> pa.ListArray:
    begin, end = lists.offsets[0].as_py(), lists.offsets[-1].as_py()
    offsets = pc.subtract(lists.offsets, lists.offsets[0]).cast(pa.int32())
    images = _without_path(lists.values.slice(begin, end - begin))
    return pa.ListArray.from_arrays(offsets, images, mask=lists.is_null())
