"""The target of lmms-eval's entry point `lmms_eval.models`, which registers the adapter as `fusion`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="fusion",
    chat_class_path="fusion_hf.evaluation.lmms_adapter.FusionChat",
    simple_class_path="fusion_hf.evaluation.lmms_adapter.FusionSimple",
    aliases=("fusion_hf", "fusion-hf"),
)
