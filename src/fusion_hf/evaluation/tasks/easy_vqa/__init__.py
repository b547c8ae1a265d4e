"""easy-vqa's test questions as a task of lmms-eval, from the package `easy-vqa` alone."""

import json
import shutil
from importlib import resources
from pathlib import Path

import yaml

from fusion_hf.common.errors import InputError
from fusion_hf.data.easy_vqa import read_easy_vqa

TEMPLATE, FUNCTIONS, ROWS = "easy_vqa.yaml", "functions.py", "test.jsonl"


def prepare_easy_vqa(folder: Path, task_name: str) -> Path:
    """
    Write the task called `task_name`, its functions and its questions into `folder`; returns the YAML file.

    Raises:
        InputError: if the package `easy-vqa` is not installed.
    """
    try:
        images = read_easy_vqa("test")
    except ImportError as error:
        raise InputError(f"The task easy_vqa cannot run: {error}") from error
    own = folder / task_name
    own.mkdir(parents=True, exist_ok=True)
    with (own / ROWS).open("w", encoding="utf-8") as stream:
        for image in images:
            for question, answer in image.questions:
                row = {"image": str(image.path.resolve()), "question": question, "answer": answer}
                stream.write(json.dumps(row) + "\n")
    files = resources.files(__package__)
    with resources.as_file(files / FUNCTIONS) as functions:
        shutil.copyfile(functions, own / FUNCTIONS)
    data = {"data_files": {"test": str((own / ROWS).resolve())}, "cache_dir": str((own / "cache").resolve())}
    head = yaml.safe_dump({"task": task_name, "dataset_kwargs": data})
    target = own / f"{task_name}.yaml"
    target.write_text(head + (files / TEMPLATE).read_text(encoding="utf-8"), encoding="utf-8")
    return target
