"""LoRA adapters in some parts of a model, next to other parts that are trained in full. One safetensors file holds
both.

Adapters are read strictly. PEFT ignores keys that it does not find, and a model with half of its adapter still
answers, only badly. Here, every missing or unexpected key is an error.
"""

import sys
from collections.abc import Collection, Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.outputs import new_folder
from fusion_hf.hub.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, read_adapter
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.devices import DTYPES
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.quantization_fusion import LINEAR_4BIT, NOT_QUANTIZED
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.cast_dtype import cast_weights
from fusion_hf.training.gradient_checkpointing import hide_peft_deprecation
from fusion_hf.training.parameter_groups import LANGUAGE_MODEL, MODULES_OF_PART, part_of
from fusion_hf.training.recipe_keys import LORA_BIASES, NO_BIAS
from fusion_hf.training.run_card import write_run_card

HEAD = "lm_head"
UNUSED_ORIGINAL = ".original_module."  # marks the frozen copy that PEFT keeps of a module trained in full
WHOLE_MODULES = tuple(name for names in MODULES_OF_PART.values() for name in names)
# Fields that an adapter's configuration may set. All other fields must have PEFT's default.
USED = (*("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias"),)
NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)


def add_lora(model: FusionForConditionalGeneration, arguments: FusionTrainingArguments) -> PeftModel:
    """
    Freeze a model, add LoRA to `arguments.lora_parts`, and keep the parts in `arguments.train` trainable.

    Args:
        model: the model to adapt. It is changed in place.
        arguments: the training arguments with the `lora_*` keys.

    Returns:
        The PEFT model around `model`.

    Raises:
        InputError: if `lora_targets` names no linear layer.
    """
    rank, parts = arguments.lora_rank, arguments.adapted_parts
    whole = [name for part in arguments.train if part not in parts for name in MODULES_OF_PART[part]]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if arguments.lora_alpha is None else arguments.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=arguments.lora_dropout,
        target_modules=find_targets(model, arguments.lora_targets, parts),
        modules_to_save=whole or None,
        use_dora=arguments.lora_dora,
        use_rslora=arguments.lora_rslora,
        bias=arguments.lora_bias,  # type: ignore[arg-type]
    )
    if arguments.gradient_checkpointing:
        model.enable_input_require_grads()  # reentrant checkpointing needs an input with a gradient
    with hide_peft_deprecation():
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():  # with `all`, PEFT also trains the biases of frozen parts
        if part_of(name) not in arguments.train or UNUSED_ORIGINAL in name:
            parameter.requires_grad_(False)
    config.base_model_name_or_path = arguments.model  # not the local cache folder, which other machines lack
    return adapted


def find_targets(
    model: nn.Module, targets: Iterable[str] | None = None, parts: Collection[str] = (LANGUAGE_MODEL,)
) -> list[str]:
    """
    List the names of the linear layers that get LoRA.

    Samplers lie inside the language model's layers, but they count as a part of their own.

    Args:
        model: a FUSION model.
        targets: names of layers, or their last components, such as `q_proj`. None selects all linear layers of the
            parts, except the language model's head.
        parts: the parts that get LoRA, a subset of `vision_tower`, `projectors`, `samplers` and `language_model`.

    Returns:
        The full names of the selected layers.

    Raises:
        InputError: if one of `targets` matches no linear layer of the parts.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(f"{name}.") in parts
    ]
    if targets is None:
        return [name for name in linear if name != HEAD]
    found: set[str] = set()
    for target in targets:
        named = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not named:
            allowed = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(f"`lora_targets` must contain names that end in one of {allowed}, got {target!r}.")
        found.update(named)
    return sorted(found)


def quantization_config(arguments: FusionTrainingArguments) -> BitsAndBytesConfig:
    """
    Make the bitsandbytes configuration that quantizes the language model's layers to 4 bits (NF4) or 8 bits.

    The vision tower, projectors, samplers and head keep their dtype.

    Args:
        arguments: the training arguments, with `load_in_4bit` or `load_in_8bit` set.

    Returns:
        The configuration for `from_pretrained`.

    Raises:
        InputError: if bitsandbytes is not installed or does not support the device.
    """
    key, bits = ("load_in_8bit", 8) if arguments.load_in_8bit else ("load_in_4bit", 4)
    if find_spec("bitsandbytes") is None:
        raise InputError(f"`{key}` requires bitsandbytes. Install the extra `quant`, or set {key}=false.")
    from bitsandbytes import supported_torch_devices

    if arguments.device.type not in supported_torch_devices:
        allowed = ", ".join(sorted(supported_torch_devices))
        raise InputError(
            f"`{key}` must be false on the device {arguments.device.type!r}, got True. The installed bitsandbytes "
            f"supports {bits} bits on {allowed}."
        )
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        llm_int8_skip_modules=list(NOT_QUANTIZED),  # despite its name, this also applies to 4 bits
    )


def keep_gradients(model: nn.Module) -> None:
    """
    Disable the 4-bit CPU kernel of bitsandbytes that computes no gradients.

    The first evaluation pass would enable it for the rest of the training (bitsandbytes 0.50.2).

    Args:
        model: a quantized model, changed in place.
    """
    for module in model.modules():
        if type(module).__name__ == LINEAR_4BIT:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def load_adapter(model: FusionForConditionalGeneration, folder: str | Path) -> PeftModel:
    """
    Load the adapter that a LoRA run wrote to `folder` into a model for inference.

    Args:
        model: the base model of the adapter.
        folder: the `output_dir` of the run.

    Returns:
        The PEFT model around `model`.

    Raises:
        InputError: if the adapter does not match this model exactly. The message names the file and the first wrong
            key or field.
    """
    folder = Path(folder)
    with hide_peft_deprecation():
        adapted = get_peft_model(model, read_config(folder, model))
    weights = read_weights(folder, get_peft_model_state_dict(adapted))
    set_peft_model_state_dict(adapted, weights)
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    return adapted.eval()


def merge(adapter: Path, output: Path, base: str | None = None, dtype: str = "float32") -> None:
    """
    Merge an adapter into its base model and write a complete model folder.

    The folder gets weights, configurations, code files and the processor.

    Args:
        adapter: the `output_dir` of a LoRA run.
        output: a new or empty folder. It appears only after everything in it has been written.
        base: the base model's folder or Hub repository. None uses the one that the adapter names.
        dtype: the dtype of the written weights, a key of `DTYPES`. Base and adapter are added in float32.

    Raises:
        InputError: if the adapter does not belong to the base model, or `output` is not empty.
    """
    if dtype not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    named = base_of(adapter, base)
    with new_folder(output) as folder:
        start = ChatModel.load(named, device="cpu", dtype="float32")
        has_terminal = sys.stderr.isatty()
        merged = load_adapter(start.model, adapter).merge_and_unload(progressbar=has_terminal, safe_merge=True)
        merged.save_pretrained(folder)
        start.processor.save_pretrained(folder)
        cast_weights(folder, dtype)
        write_run_card(folder, adapter, named, output.resolve().name)


def check_adapter(adapted: PeftModel, folder: str | Path) -> None:
    """
    Check that `folder` holds exactly the adapter weights of a model, before PEFT loads them.

    Args:
        adapted: the model with its adapters.
        folder: the folder of the adapter's file.

    Raises:
        InputError: if a key is missing or unexpected, or a shape differs. The message names the file and the first
            key.
    """
    read_weights(Path(folder), get_peft_model_state_dict(adapted))


def read_config(folder: Path, model: nn.Module) -> LoraConfig:
    """
    Read and check the adapter configuration in a folder.

    Args:
        folder: the adapter's folder.
        model: the base model, whose layers the configuration must name.

    Returns:
        The LoRA configuration.

    Raises:
        InputError: if a field has a value that `add_lora` does not write.
    """
    content = read_adapter(folder)
    _check_config(content, folder / ADAPTER_CONFIG, model)
    return LoraConfig(**{name: content[name] for name in USED if name in content})


def _check_config(content: dict[str, Any], path: Path, model: nn.Module) -> None:
    """
    Accept only what `add_lora` writes, since other PEFT fields change weights or import modules that the file
    names.
    """
    defaults = LoraConfig().to_dict()
    known = {field.name for field in fields(LoraConfig)}
    for name, value in content.items():
        if name in USED or name in NOTES or value in (None, False, [], {}):
            continue
        if name not in known or value != defaults[name]:
            raise InputError(f"{path}: `{short_name(name)}` must have PEFT's default, got {short_name(repr(value))}.")
    rank, widest = content.get("r"), max(max(parameter.shape) for parameter in model.parameters() if parameter.ndim)
    if type(rank) is not int or not 1 <= rank <= widest:
        raise InputError(f"{path}: `r` must be an integer from 1 to {widest}, got {short_name(repr(rank))}.")
    for name in ("lora_alpha", "lora_dropout"):
        if type(content.get(name)) not in (int, float):
            raise InputError(f"{path}: `{name}` must be a number, got {short_name(repr(content.get(name)))}.")
    for name in ("use_dora", "use_rslora"):
        if type(content.get(name, False)) is not bool:
            raise InputError(f"{path}: `{name}` must be true or false, got {short_name(repr(content[name]))}.")
    if content.get("bias", NO_BIAS) not in LORA_BIASES:
        raise InputError(
            f"{path}: `bias` must be one of {', '.join(LORA_BIASES)}, got {short_name(repr(content['bias']))}."
        )
    targets, whole = content.get("target_modules"), content.get("modules_to_save") or []
    for name, names in (("target_modules", targets), ("modules_to_save", whole)):
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise InputError(f"{path}: `{name}` must be a list of names, got {short_name(repr(names))}.")
    if strange := sorted(set(whole) - set(WHOLE_MODULES)):
        raise InputError(
            f"{path}: `modules_to_save` may hold {', '.join(WHOLE_MODULES)}, got {short_name(strange[0])}."
        )
    modules = [f".{name}" for name, _ in model.named_modules()]
    for target in content["target_modules"]:
        if not any(name.endswith(f".{target}") for name in modules):
            raise InputError(f"{path}: `target_modules` must name layers of this model, got {short_name(target)}.")


def read_weights(folder: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Read the tensors of an adapter's folder and check their names and shapes.

    Args:
        folder: the adapter's folder.
        expected: tensors with the names and shapes that the file must have.

    Returns:
        The tensors by name.

    Raises:
        InputError: if the file is missing, cannot be read, or holds other names or shapes.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} does not exist. Adapters are read from safetensors files only.")
    try:
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            _check_keys(path, shapes, expected)
            return {name: opened.get_tensor(name) for name in sorted(names)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}. Copy the adapter again.") from error


def _check_keys(path: Path, shapes: dict[str, tuple[int, ...]], expected: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - shapes), sorted(shapes.keys() - expected)
    found = [
        f"{len(names)} keys are {what}, such as {short_name(names[0])}"
        for what, names in (("missing", missing), ("unknown", extra))
        if names
    ]
    if found:
        raise InputError(
            f"{path} is not an adapter of this model: {'; '.join(found)}. Give the base model that it was trained "
            "on, or copy the adapter again."
        )
    for name, tensor in expected.items():
        if shapes[name] != tuple(tensor.shape):
            raise InputError(f"{path}: {name} must have the shape {tuple(tensor.shape)}, got {shapes[name]}.")
