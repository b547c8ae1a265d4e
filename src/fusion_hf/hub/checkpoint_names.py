"""Loading the authors' checkpoints by name: `from_pretrained` gets the converted folder instead.

transformers has no hook for this. `AutoTokenizer` and `AutoImageProcessor` read the files of a repository, and may
fail, before they look for a registered class. Therefore `from_pretrained` of each class that loads a FUSION checks the
name first. Names of other models are passed on. If their configuration is in the cache, the Hub is not contacted;
otherwise, it is fetched here instead of a little later.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError

from fusion_hf.common.errors import InputError
from fusion_hf.hub.folders import CONFIG, REPOSITORY, HubOptions, convert_checkpoint, is_authors_type, read_config

MARK = "_takes_authors_names"
SECONDS = 10.0  # until the Hub answers the first request
HUB_ERRORS = (OSError, HTTPError, HFValidationError, ValueError)


def take_authors_names(*classes: type) -> None:
    """Let `from_pretrained` of these classes load the authors' checkpoints. A second call changes nothing."""
    for each in classes:
        loader = each.from_pretrained.__func__  # type: ignore[attr-defined]
        if not hasattr(loader, MARK):
            each.from_pretrained = classmethod(_with_names(loader))  # type: ignore[attr-defined]


def _with_names(loader: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(loader)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = find_converted(pretrained_model_name_or_path, **kwargs)
        return loader(cls, pretrained_model_name_or_path if folder is None else str(folder), *args, **kwargs)

    setattr(from_pretrained, MARK, True)
    return from_pretrained


def find_converted(
    name: Any,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    **others: Any,
) -> Path | None:
    """
    Return the model folder of one of the authors' checkpoints, which is converted if necessary.

    Args:
        name, revision, cache_dir, token, local_files_only, subfolder: Arguments of `from_pretrained`.
        others: Further arguments of `from_pretrained`, which are ignored.

    Returns:
        The model folder, or None for every other name.

    Raises:
        InputError: If the checkpoint cannot be converted.
    """
    if subfolder or not isinstance(name, (str, Path)):
        return None
    hub = HubOptions(cache_dir, token, local_files_only)
    folder, repository = Path(name), str(name)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError):  # the name is too long or contains a null character
        return None
    if is_folder:
        return convert_checkpoint(repository, folder, hub) if _is_authors(folder / CONFIG) else None
    if exists or not REPOSITORY.fullmatch(repository):
        return None
    known = try_to_load_from_cache(repository, CONFIG, cache_dir, revision)
    if isinstance(known, str) and not _is_authors(Path(known)):
        return None
    try:
        if not isinstance(known, str) and not local_files_only:
            # a single try, because a download is tried for half a minute, and then again by the loader
            HfApi().model_info(repository, revision=revision, timeout=SECONDS, token=token)
        config = hf_hub_download(
            repository,
            CONFIG,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    except HUB_ERRORS:  # the loader reports them better
        return None
    return convert_checkpoint(repository, Path(config).parent, hub) if _is_authors(Path(config)) else None


def _is_authors(config: Path) -> bool:
    try:
        return is_authors_type(read_config(config))
    except InputError:  # the loader reports the problem
        return False
