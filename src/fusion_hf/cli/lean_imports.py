"""
Importing transformers, and loading a model, without what a process that asks one model never calls.

Beside what a model needs, transformers imports torch's compiler (`torch._dynamo`), distributed tensors, FSDP and, for
losses of object detection, scipy. That is half of the time until a model is loaded, and has no switch. So a command
that owns its process says that scipy, scikit-learn and torch's distributed package are absent, which transformers
supports, and puts stand-ins into the place of the compiler. The list of models that transformers makes by reading all
of its files is kept (`model_list`). Asked for anything else than what is written here, a
stand-in makes room for the module itself. Answers are the same, bit for bit.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

from fusion_hf.cli.model_list import kept_model_list
from fusion_hf.common.outputs import cache_folder

COMPILER = "torch._dynamo"
INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"
# questions of transformers about what is installed; quantized models are imported as usual
ABSENT = ("is_scipy_available", "is_sklearn_available", "is_torch_distributed_available", "is_torchao_available")
# where these are imported already, they have taken what they need
TAKERS = (COMPILER, "transformers.generation.utils", "transformers.modeling_utils", "transformers.masking_utils")


@contextmanager
def lean_imports(owns_process: bool) -> Iterator[None]:
    """
    Leave out, of what a `with` block imports, what a command that asks one model does not call.

    Args:
        owns_process: whether the process ends with the command. If not, all is imported as usual, since what comes
            later in the process may train on several devices.
    """
    if not owns_process or not sys.modules.keys().isdisjoint(TAKERS):
        yield
        return
    gc.disable()  # modules stay: looking for garbage among them is a tenth of the time
    try:
        import torch  # before its compiler has a stand-in

        with kept_model_list(cache_folder() / "transformers"):
            import transformers.utils
            from transformers.utils import import_utils

            for name in ABSENT:
                for module in (import_utils, transformers.utils):
                    if hasattr(module, name):
                        setattr(module, name, _is_absent)
            with _stand_ins(), _values_in_memory(torch):
                yield
        gc.freeze()
    finally:
        gc.enable()


def _is_absent() -> bool:
    return False


def _mark(function: Callable | None = None, *_: Any, **__: Any) -> Any:
    """A decorator of the compiler, with arguments of its own or without: the function as it is."""
    return _mark if function is None else function


def _index_by_tensors(*args: Any) -> Any:
    """The context in which masks are made while they are traced: imported when there is one."""
    return import_module(INDEXING).TransformGetItemToIndex(*args)


KNOWN: dict[str, dict[str, Any]] = {
    COMPILER: dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _mark),
    INDEXING: {"TransformGetItemToIndex": _index_by_tensors},
}


class _StandIn(ModuleType):
    """A module as far as `KNOWN` has it. What is in its folder can be imported."""

    def __init__(self, name: str):
        super().__init__(name)
        parent, _, _ = name.rpartition(".")
        if parent not in KNOWN and (spec := find_spec(name)) is not None and spec.submodule_search_locations:
            self.__path__ = list(spec.submodule_search_locations)

    def __getattr__(self, name: str) -> Any:
        if name in KNOWN[self.__name__]:
            return KNOWN[self.__name__][name]
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(import_module(self.__name__), name)


class _SubmoduleFinder(MetaPathFinder):
    """Puts the module itself in the place of a stand-in when somebody imports one of its submodules."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        parent, _, _ = name.rpartition(".")
        if not isinstance(sys.modules.get(parent), _StandIn):
            return None
        _remove_stand_ins()
        import_module(parent)  # first, since it imports its submodules in an order of its own
        return spec_from_loader(name, _LoadedModule(import_module(name)))


class _LoadedModule(Loader):
    """Gives a module that has been imported already."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # which the import system has replaced


@contextmanager
def _stand_ins() -> Iterator[None]:
    sys.modules.update({name: _StandIn(name) for name in KNOWN if name not in sys.modules})
    finder = _SubmoduleFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _remove_stand_ins()


def _remove_stand_ins() -> None:
    for name in KNOWN:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


@contextmanager
def _values_in_memory(torch: Any) -> Iterator[None]:
    """
    A model is made on the meta device, whose functions in Python import the compiler and sympy. So weights, which
    have no memory there, are not drawn, and the few small tensors that are computed have memory.
    """
    with torch.device("meta"):
        torch.empty(0)  # the first time, torch lists the functions that heed a device
    draw, arange, tensor = torch.nn.init.normal_, torch.arange, torch.tensor
    torch.nn.init.normal_ = lambda weight, *args, **kwargs: weight if weight.is_meta else draw(weight, *args, **kwargs)
    torch.arange, torch.tensor = _on_cpu(arange, torch), _on_cpu(tensor, torch)
    try:
        yield
    finally:
        torch.nn.init.normal_, torch.arange, torch.tensor = draw, arange, tensor


def _on_cpu(make: Callable[..., Any], torch: Any) -> Callable[..., Any]:
    """A function that makes tensors, as it is but for those without memory, which it makes on the CPU."""

    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        # by an empty tensor, transformers asks on which device it makes modules
        asks = len(args) == 1 and isinstance(args[0], list) and not args[0]
        if kwargs.get("device") is None and not asks and torch.empty(0).is_meta:
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made
