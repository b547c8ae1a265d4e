"""The files that a recipe names, seen before a run imports what takes seconds. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import check_place
from fusion_hf.data.mixture import read_entries
from fusion_hf.hub.folders import find_folder

FINISHED_FILE = "finished.json"  # in `output_dir`, when the model is there
CHECKPOINT_CHOICES = ("auto", "none")


def check_files(values: Mapping[str, Any]) -> None:
    """
    What a run reads is there, and its folder can be written. A finished run reads nothing.

    Raises:
        InputError: for the first thing that is missing; names the key.
    """
    output = Path(values["output_dir"])
    if (output / FINISHED_FILE).is_file():
        return
    for key, root in (("data", values.get("data_root")), ("eval_data", None)):
        if values.get(key) is not None:
            check_data(values[key], root, key)
    given = values.get("resume_from_checkpoint")
    if given not in (None, *CHECKPOINT_CHOICES) and not Path(str(given)).is_dir():
        raise InputError(f"resume_from_checkpoint is {given!r}; allowed: auto, none, or a checkpoint's folder.")
    check_place(output, "output_dir")
    find_folder(values["model"])  # last: one of the Hub is fetched


def check_data(source: str, root: str | None = None, key: str = "data") -> None:
    """
    Every file and folder of a mixture, or of what is no mixture, is there; data sets of the Hub are taken as given.

    Raises:
        InputError: for the first that is missing.
    """
    for entry in read_entries(source, root, key):
        entry.locate()
