"""A LoRA adapter put into its base: a model folder like any other."""

from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import new_folder
from fusion_hf.hub.folders import base_of
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.devices import DTYPES
from fusion_hf.training.adapters import load_adapter
from fusion_hf.training.cast_dtype import cast_weights


def merge(adapter: Path, output: Path, base: str | None = None, dtype: str = "float32") -> None:
    """
    Write base + adapter as a complete model folder: weights, configurations, code files, processor.

    Args:
        adapter: `output_dir` of a LoRA run.
        output: a new or an empty folder; it appears only when all of it is there.
        base: folder or Hub repository; None: the one that the adapter names.
        dtype: of the written weights, a key of `DTYPES`. They are added up as float32.

    Raises:
        InputError: if the adapter is none of this base, or `output` is not empty.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    named = base_of(adapter, base)
    with new_folder(output) as folder:
        start = ChatModel.load(named, device="cpu", dtype="float32")
        merged = load_adapter(start.model, adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder)
        start.processor.save_pretrained(folder)
        cast_weights(folder, dtype)
