"""Publishing model folders on the Hub. Everything is checked first, then uploaded in one commit."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from fusion_hf import __version__
from fusion_hf.common.errors import InputError
from fusion_hf.hub.folders import ADAPTER_CONFIG, CONFIG, FINISHED_FILE, RECIPE_FILE, WEIGHTS_INDEX
from fusion_hf.hub.model_cards import CARD, LIBRARY, TASK, licence_of_card
from fusion_hf.hub.parity import card_with_parity, check_parity

CODE_FOLDER, CODE_PATTERN = Path(__file__).parents[1] / "model", "*_fusion*.py"  # code in every model folder
WEIGHTS = "model.safetensors"
NEEDED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    CARD,
)
TEXT, IMAGE_SUFFIXES, TOKENIZER = (".json", ".jinja", ".md", ".txt"), (".png", ".jpg", ".jpeg", ".webp"), ".model"
SAFETENSORS = ".safetensors"
OTHER_NAMES = (".gitattributes", "LICENSE", "NOTICE")
NOT_SENT = (".git", ".cache")  # folders of git and huggingface_hub
# Files of a training run beside its model. None is needed to use the model, and they may contain paths and pickles.
# Folders end with a slash.
OF_A_RUN = re.compile(
    r"(?:\w+-)?checkpoint-\d+(?:-\d+)?/|runs/|wandb/|log\.jsonl|recipe\.yaml|finished\.json|skipped\.jsonl(?:\.lock)?"
    r"|training_args\.bin|trainer_state\.json|(?:all|train|eval)_results\.json|emissions\.csv"
)
CODE_BEGINNINGS = (b"\x80", b"PK\x03\x04")  # first bytes of pickles, and of the archives that torch.save writes
CARD_FIELDS = {"library_name": LIBRARY, "pipeline_tag": TASK, "license": None}
CLASS = re.compile(r"(\w+)\.\w+")  # in an auto_map: a module of the folder, and not of another repository
EXAMPLE, MODEL_ID = "```python\n", re.compile(r'^model_id = ("[^"\n]+")$', re.MULTILINE)  # in cards
TAG = re.compile(r"[A-Za-z0-9][\w.+-]*")
SECONDS = 10.0  # until the Hub answers the first request
UPLOAD_ERRORS = (OSError, HTTPError, HFValidationError, ValueError, RuntimeError)


class SentFile(NamedTuple):
    """A file that is published."""

    name: str
    size: int  # bytes


def check_files(folder: Path) -> list[SentFile]:
    """
    Check the files of a model folder, without running the model.

    Files that a training run has left beside its model are skipped, see `OF_A_RUN`.

    Args:
        folder: Model folder.

    Returns:
        The files to publish.

    Raises:
        InputError: If a file is missing or wrong. The message names the file and the problem.
    """
    if not folder.is_dir():
        raise InputError(f"--model must be a model folder, got {folder}, which is not a folder.")
    is_run = (folder / RECIPE_FILE).is_file()
    if is_run and not (folder / FINISHED_FILE).is_file():
        raise InputError(f"--model: the training run in {folder} is not finished. Pass its recipe to fusion-hf train.")
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        advice = f"fusion-hf merge --model {folder} --output NEW_DIR"
        raise InputError(f"--model: {folder} is a LoRA adapter. Merge it with its base model first: {advice}.")
    paths = sorted(path for path in folder.iterdir() if path.name not in NOT_SENT)
    if is_run:
        paths = [path for path in paths if not OF_A_RUN.fullmatch(f"{path.name}/" if path.is_dir() else path.name)]
    names = {path.name for path in paths}
    code = {path.name: path for path in sorted(CODE_FOLDER.glob(CODE_PATTERN))}
    for name in (*NEEDED, *code):
        if name not in names:
            advice = "Write its model card" if name == CARD else "Save or convert the model again"
            raise InputError(f"{folder} has no {name}. {advice}.")
    for path in paths:
        _check_file(path, code)
    _check_weights(folder, {path.name for path in paths if path.suffix == SAFETENSORS})
    _check_card(folder / CARD)
    check_parity(folder)
    return [SentFile(path.name, path.stat().st_size) for path in paths]


def _check_file(path: Path, code: dict[str, Path]) -> None:
    """Check that a file is either code of this package or of a type that cannot contain code."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, but a model folder contains only files. Move it away.")
    if path.suffix == ".py":
        if path.name not in code:
            raise InputError(f"{path} is code that FUSION does not need. Remove it.")
        if path.read_bytes() != code[path.name].read_bytes():
            raise InputError(f"{path} differs from {path.name} of fusion_hf {__version__}. Save the model again.")
        return
    if path.suffix not in (*TEXT, *IMAGE_SUFFIXES, TOKENIZER, SAFETENSORS) and path.name not in OTHER_NAMES:
        raise InputError(f"{path} does not belong in a model folder, because pickles can contain code. Remove it.")
    with path.open("rb") as file:
        if path.suffix != SAFETENSORS and file.read(len(max(CODE_BEGINNINGS, key=len))).startswith(CODE_BEGINNINGS):
            raise InputError(f"{path} begins like a pickle or an archive, which can contain code. Remove it.")
    if path.suffix in TEXT or path.name in OTHER_NAMES:
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else None
        except ValueError as error:  # invalid encoding or JSON
            raise InputError(f"{path} cannot be read: {error}") from error
        _check_auto_map(path, values, code)


def _check_auto_map(path: Path, values: Any, code: dict[str, Path]) -> None:
    """Check that classes are those of the folder: an auto_map may name a repository, whose code would be run."""
    if not isinstance(values, dict) or not isinstance(values.get("auto_map", {}), dict):
        return
    for classes in values.get("auto_map", {}).values():
        for name in classes if isinstance(classes, list) else [classes]:
            match = CLASS.fullmatch(str(name))
            if name is not None and (match is None or f"{match[1]}.py" not in code):
                allowed = f"names of classes in {', '.join(code)}"
                raise InputError(f"{path}: the values of `auto_map` must be {allowed}, got {name!r}.")


def _check_weights(folder: Path, files: set[str]) -> None:
    """Check that every weights file is readable, belongs to the model, and has the tensors in the index."""
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        expected: dict[str, set[str]] = {WEIGHTS: set()}
    else:
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        expected = {file: {key for key, place in weight_map.items() if place == file} for file in weight_map.values()}
    for name in sorted(expected):
        if name not in files:
            raise InputError(f"{folder} has no {name}. Copy or save the weights again.")
    for name in sorted(files):
        if name not in expected:
            raise InputError(f"{folder / name} is not part of the model. Remove it.")
        try:
            with safe_open(folder / name, "numpy") as file:
                keys = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name} cannot be read: {error}. Copy or save it again.") from error
        if index.is_file() and keys != expected[name]:
            odd = sorted(keys ^ expected[name])[0]
            raise InputError(f"{index} and {name} disagree about {odd}. Copy or save the weights again.")


def _check_card(path: Path) -> None:
    """Check a card by the rules of huggingface_hub that need no network, and for the fields that the Hub displays."""
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data.to_dict()
    except (ValueError, TypeError, YAMLError) as error:
        raise InputError(f"{path} has invalid metadata: {error}") from error
    for name, expected in CARD_FIELDS.items():
        value = data.get(name)
        if not value or (expected is not None and value != expected):
            allowed = "the identifier of a licence" if expected is None else repr(expected)
            raise InputError(f"{path}: `{name}` must be {allowed} in the metadata, got {value!r}.")


def card_for(folder: Path, repository: str) -> bytes:
    """
    Return the card of a folder for a repository.

    The examples load the model from the repository instead of the folder, and the results of a certificate are added.

    Args:
        folder: Model folder.
        repository: Name of the repository.

    Returns:
        The encoded text.
    """
    text = card_with_parity(folder, (folder / CARD).read_text(encoding="utf-8"))
    match = MODEL_ID.search(text)
    if match is None:
        return text.encode()
    head, *examples = text.split(EXAMPLE)
    return EXAMPLE.join([head, *(each.replace(match[1], f'"{repository}"') for each in examples)]).encode()


def names_licence(folder: Path) -> bool:
    """Return whether the card of a checked folder names the licence of the model."""
    return licence_of_card(ModelCard((folder / CARD).read_text(encoding="utf-8")).data.to_dict()) is not None


def check_alone(folder: Path) -> None:
    """
    Check that a folder loads and answers without this package.

    Args:
        folder: Model folder.

    Raises:
        InputError: If it does not.
    """
    script = Path(__file__).with_name("standalone_check.py").read_text(encoding="utf-8")
    hidden = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    with tempfile.TemporaryDirectory() as empty:
        result = subprocess.run(
            [sys.executable, "-c", script, str(folder.resolve())],
            cwd=empty,
            env={**hidden, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": empty},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise InputError(f"{folder} does not work on its own, without this package: {reason}")


def check_repository(repository: str, flag: str) -> None:
    """
    Check, before any work starts, that an upload can succeed.

    Args:
        repository: Name of the repository.
        flag: Option that was used, for errors.

    Raises:
        InputError: If the name is invalid, or if nobody is logged in.
    """
    check_name(repository, flag)
    if get_token() is None:
        raise InputError(f"{flag} requires a login. Run `hf auth login`, or set HF_TOKEN.")


def check_name(repository: str, flag: str) -> None:
    """Raise an `InputError` if a name is not valid for a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{flag}: {error}") from error


def check_tag(tag: str) -> None:
    """Raise an `InputError` if a name is not valid for a version."""
    if not TAG.fullmatch(tag):
        allowed = "letters, digits and . _ + -, beginning with a letter or digit"
        raise InputError(f"--tag must be {allowed}, got {tag!r}.")


def upload(
    folder: Path, names: Sequence[str], repository: str, private: bool, message: str, tag: str | None = None
) -> str:
    """
    Upload files of a folder in one commit, and tag it.

    If the commit fails, a repository that was created for it is removed again.

    Args:
        folder: Model folder.
        names: Names of the files.
        repository: Name of the repository.
        private: Whether to make a new repository private.
        message: Commit message.
        tag: Tag of the version, which must be new.

    Returns:
        The URL of the commit or the tag.

    Raises:
        InputError: If the tag exists, the repository is public although `private` is set, or the upload fails.
    """
    api = HfApi()
    is_created = is_committed = False
    try:
        is_new = check_remote(repository, private, tag)
        url = api.create_repo(repository, private=private or None, exist_ok=not is_new)
        is_created = is_new
        operations = [
            CommitOperationAdd(name, card_for(folder, repository) if name == CARD else folder / name) for name in names
        ]
        # the Hub checks the card before anything is uploaded
        commit = api.create_commit(repository, operations, commit_message=message)
        is_committed = True
    except InputError:
        raise
    except UPLOAD_ERRORS as error:
        raise InputError(f"The upload failed, and {repository} is unchanged: {error}") from error
    finally:
        if is_created and not is_committed:
            _withdraw(api, repository)
    if tag is None:
        return commit.commit_url
    try:
        api.create_tag(repository, tag=tag, revision=commit.oid)
    except UPLOAD_ERRORS as error:
        raise InputError(
            f"All files are in {url}, but the tag {tag} could not be created. Run the same command again. {error}"
        ) from error
    return f"{url}/tree/{tag}"


def _withdraw(api: HfApi, repository: str) -> None:
    """Remove an empty repository."""
    try:
        api.delete_repo(repository, missing_ok=True)
    except UPLOAD_ERRORS as error:
        raise InputError(f"The upload failed, and {repository} is left empty: {error}") from error


def check_remote(repository: str, private: bool, tag: str | None = None) -> bool:
    """
    Check that a repository is new, or fits an upload.

    Args:
        repository: Name of the repository.
        private: Whether it must be private.
        tag: Tag that must be new.

    Returns:
        Whether the repository is new.

    Raises:
        InputError: If it does not fit, or if the Hub cannot be reached.
    """
    api = HfApi()
    try:
        info = api.repo_info(repository, timeout=SECONDS)
    except RepositoryNotFoundError:
        return True
    except UPLOAD_ERRORS as error:
        raise InputError(f"The Hub cannot be asked about {repository}, which is unchanged: {error}") from error
    if private and not info.private:
        raise InputError(
            f"--private: {repository} exists and is public. Choose another name, or change it on the Hub."
        )
    if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repository).tags}:
        raise InputError(f"--tag must be new, but {repository} already has a version {tag}.")
    return False
