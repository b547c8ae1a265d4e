"""
The list of all models' classes that `import transformers` makes, kept from one process to the next.

Whenever `transformers` is imported, it reads the more than two thousand files of its models to learn which class is in
which file. That takes about half a second, and the result changes only with the installed version. Therefore the list
is kept in a file in the user's cache, together with the version and the time of the last change of the models' folder.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from fusion_hf.common.outputs import json_bytes, write_atomically

MODELS = "models"  # the folder of all models, and what their modules' names begin with
IMPORT_UTILS = "transformers.utils.import_utils"
MAX_BYTES = 2**22  # of the file; the list of transformers 5.24 takes 0.2 MB
DEVELOPMENT = "dev"  # in the version of a checkout, whose files change without it

# backends that are needed -> module -> names of its classes and functions
Structure = dict[frozenset[str], dict[str, set[str]]]


@contextmanager
def kept_model_list(folder: Path) -> Iterator[None]:
    """
    Let what a `with` block imports of transformers take the list of models from a file, which is made if need be.

    Args:
        folder: where the file is kept. If it cannot be written, models are listed as without this function.
    """
    finder = _ImportUtilsFinder(folder)
    if (module := sys.modules.get(IMPORT_UTILS)) is not None:
        finder.replace(module)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.restore()


class _ImportUtilsFinder(MetaPathFinder):
    """Finds the module that lists models, and replaces its function before `transformers` calls it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.replaced: list[tuple[ModuleType, Callable[..., Any]]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name != IMPORT_UTILS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ReplacingLoader(spec.loader, self.replace)
        return spec

    def replace(self, module: ModuleType) -> None:
        define = module.define_import_structure
        module.define_import_structure = (  # type: ignore[attr-defined]
            lambda path, prefix=None: list_models(define, path, prefix, self.folder)
        )
        self.replaced.append((module, define))

    def restore(self) -> None:
        for module, define in self.replaced:
            module.define_import_structure = define  # type: ignore[attr-defined]


class _ReplacingLoader(Loader):
    """Loads a module as another loader does, and then changes it."""

    def __init__(self, loader: Loader, change: Callable[[ModuleType], None]):
        self.loader, self.change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)


def list_models(define: Callable[..., Any], path: str | Path, prefix: str | None, folder: Path) -> Any:
    """
    List the models of transformers, from the file if it is still right.

    Args:
        define: `define_import_structure` of transformers.
        path: what it is asked for. Anything but the folder of all models is left to it.
        prefix: what modules' names begin with.
        folder: where the file is kept.

    Returns:
        What `define` returns for `path` and `prefix`.
    """
    path = Path(path)
    if prefix == MODELS and path.name == MODELS:
        return _kept(define, path, folder)
    if prefix is None and path.name == "__init__.py" and path.parent.name == MODELS:
        return {
            # transformers has added modules of its own to the list with the prefix
            backends: {
                name.removeprefix(f"{MODELS}."): names
                for name, names in modules.items()
                if name.startswith(f"{MODELS}.")
            }
            for backends, modules in _kept(define, path.parent, folder).items()
        }
    return define(path, prefix)


def _kept(define: Callable[..., Any], models: Path, folder: Path) -> Structure:
    version = sys.modules["transformers"].__version__
    if DEVELOPMENT in version:
        return define(models, prefix=MODELS)
    source = {"version": version, "folder": os.fspath(models), "changed": models.stat().st_mtime_ns}
    file = folder / f"{hashlib.sha256(source['folder'].encode()).hexdigest()[:16]}.json"
    if (structure := _read(file, source)) is not None:
        return structure
    structure = define(models, prefix=MODELS)
    written = [
        [sorted(backends), {name: sorted(names) for name, names in modules.items() if _is_model(name)}]
        for backends, modules in structure.items()
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json_bytes(source | {"structure": written}))
    except OSError:
        pass  # a home that cannot be written: the list is made each time
    return structure


def _is_model(module: str) -> bool:
    """Whether a module of the list is a model's: transformers adds others to the list once it has it."""
    return module.startswith(f"{MODELS}.")


def _read(file: Path, source: dict[str, Any]) -> Structure | None:
    """Read the list if it is that of this installation."""
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        content = json.loads(file.read_bytes())
        if {key: content[key] for key in source} != source:
            return None
        return {
            frozenset(backends): {module: set(names) for module, names in modules.items()}
            for backends, modules in content["structure"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
        return None
