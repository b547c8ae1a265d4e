"""FUSION, the vision-language model family with text-guided vision encoding, for transformers.

Importing this package registers FUSION with the auto classes and pipelines of transformers. Neither torch nor a model
class is imported until you use one, so `import fusion_hf` takes little longer than `import transformers`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.hub.folders import HubOptions, convert_with
from fusion_hf.hub.registration import register_lazily

if TYPE_CHECKING:
    from fusion_hf.hub.folders import nano_path
    from fusion_hf.inference.batching import batch_generate
    from fusion_hf.inference.compilation import CompiledGenerator
    from fusion_hf.inference.cpu_linear import use_onednn
    from fusion_hf.maps import AttentionMaps, attention_maps
    from fusion_hf.model.configuration_fusion import FusionConfig
    from fusion_hf.model.image_processing_fusion import FusionImageProcessor
    from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration, FusionModel
    from fusion_hf.model.processing_fusion import FusionProcessor

__version__ = "0.1.0"

_MODULES = {
    "AttentionMaps": "fusion_hf.maps",
    "CompiledGenerator": "fusion_hf.inference.compilation",
    "FusionConfig": "fusion_hf.model.configuration_fusion",
    "FusionForConditionalGeneration": "fusion_hf.model.modeling_fusion",
    "FusionImageProcessor": "fusion_hf.model.image_processing_fusion",
    "FusionModel": "fusion_hf.model.modeling_fusion",
    "FusionProcessor": "fusion_hf.model.processing_fusion",
    "attention_maps": "fusion_hf.maps",
    "batch_generate": "fusion_hf.inference.batching",
    "nano_path": "fusion_hf.hub.folders",
    "use_onednn": "fusion_hf.inference.cpu_linear",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'fusion_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


def _convert_once(name: str, folder: Path, hub: HubOptions) -> Path:
    """Convert a checkpoint. `hub` must not import `conversion`, so the package connects both here."""
    from fusion_hf.conversion.converted_models import convert_once

    return convert_once(name, folder, hub)


convert_with(_convert_once)
register_lazily()

__all__ = [
    "AttentionMaps",
    "CompiledGenerator",
    "FusionConfig",
    "FusionForConditionalGeneration",
    "FusionImageProcessor",
    "FusionModel",
    "FusionProcessor",
    "attention_maps",
    "batch_generate",
    "nano_path",
    "use_onednn",
]
