"""Registration of FUSION with the auto classes of transformers, as soon as they are imported.

`AutoConfig.register` and similar functions take classes, so calling them immediately would import torch with every
`import fusion_hf`. Instead, a finder on `sys.meta_path` waits until the auto modules are imported. The modules of
transformers and of this package import each other in many orders, so it registers when the outermost import is done.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType

AUTO_MODULES = tuple(
    f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling", "processing", "image_processing")
)
WATCHED = ("transformers.", "fusion_hf.")


def register() -> None:
    """Register FUSION's classes with the auto classes of transformers, so that no `trust_remote_code` is needed."""
    if find_spec("torch") is None:  # a process that only reads images runs without torch
        return
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )

    # the top level of transformers 5.17 hides it if torchvision is missing
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from fusion_hf.hub.checkpoint_names import take_authors_names
    from fusion_hf.model.configuration_fusion import FusionConfig
    from fusion_hf.model.image_processing_fusion import FusionImageProcessor
    from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration, FusionModel
    from fusion_hf.model.processing_fusion import FusionProcessor

    AutoConfig.register(FusionConfig.model_type, FusionConfig, exist_ok=True)
    AutoModel.register(FusionConfig, FusionModel, exist_ok=True)
    AutoModelForImageTextToText.register(FusionConfig, FusionForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(FusionConfig, FusionForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(FusionConfig, FusionProcessor, exist_ok=True)
    processors = {"pil": FusionImageProcessor}
    AutoImageProcessor.register(FusionConfig, image_processor_classes=processors, exist_ok=True)
    take_authors_names(AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    take_authors_names(AutoProcessor, AutoImageProcessor, AutoTokenizer)
    take_authors_names(
        FusionConfig, FusionModel, FusionForConditionalGeneration, FusionProcessor, FusionImageProcessor
    )


class _Watcher(MetaPathFinder):
    """Registers FUSION after the outermost import during which an auto module was loaded."""

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(WATCHED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _WatchedLoader(spec.loader.name, spec.loader.path, self)
        return spec

    def finished(self) -> None:
        """Handle the end of each watched import that succeeded."""
        if self.depth == 0 and self in sys.meta_path and not sys.modules.keys().isdisjoint(AUTO_MODULES):
            sys.meta_path.remove(self)
            register()


class _WatchedLoader(SourceFileLoader):
    """Loads a module as usual and notifies the watcher."""

    def __init__(self, fullname: str, path: str, watcher: _Watcher):
        super().__init__(fullname, path)
        self.watcher = watcher

    def exec_module(self, module: ModuleType) -> None:
        self.watcher.depth += 1
        try:
            super().exec_module(module)
        finally:
            self.watcher.depth -= 1
        self.watcher.finished()


def register_lazily() -> None:
    """Register now if the auto classes are already imported, or else as soon as they are."""
    if not sys.modules.keys().isdisjoint(AUTO_MODULES):
        register()
    else:
        sys.meta_path.insert(0, _Watcher())
