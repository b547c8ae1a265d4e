"""LoRA in some parts, beside others that are trained as a whole; one file of safetensors holds both.

An adapter is read strictly. PEFT passes over what it does not find, and a model without half of its adapter answers,
only badly: here every key that is missing or too many is an error.
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
UNUSED_ORIGINAL = ".original_module."  # in names: what PEFT keeps of a part that is trained as a whole
WHOLE_MODULES = tuple(name for names in MODULES_OF_PART.values() for name in names)
# What an adapter's configuration may say; of all other fields only PEFT's default is understood.
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
    Freeze a model, put LoRA into some of its parts, and let the others in `arguments.train` train as a whole.

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
        model.enable_input_require_grads()  # reentrant checkpoints pass gradients on only if an input has them
    with hide_peft_deprecation():
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():  # with `all`, PEFT trains every bias that there is
        if part_of(name) not in arguments.train or UNUSED_ORIGINAL in name:
            parameter.requires_grad_(False)
    config.base_model_name_or_path = arguments.model  # not the cache's folder, which no other machine has
    return adapted


def find_targets(
    model: nn.Module, targets: Iterable[str] | None = None, parts: Collection[str] = (LANGUAGE_MODEL,)
) -> list[str]:
    """
    Name the linear layers that get LoRA. Samplers lie inside the language model's layers, but are a part apart.

    Args:
        model: a FUSION.
        targets: names, or the ends of names, such as `q_proj`. None: all of the parts', without the head.
        parts: that get LoRA.

    Raises:
        InputError: if one of `targets` is no linear layer of the parts.
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
            raise InputError(f"lora_targets holds {target!r}; allowed here: {allowed}, or longer ends of their names.")
        found.update(named)
    return sorted(found)


def quantization_config(arguments: FusionTrainingArguments) -> BitsAndBytesConfig:
    """
    4 bits (nf4) or 8 for the language model's layers; tower, projectors, samplers and head keep their type.

    Raises:
        InputError: if bitsandbytes is not there, or does not know the device.
    """
    key, bits = ("load_in_8bit", 8) if arguments.load_in_8bit else ("load_in_4bit", 4)
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{key} needs bitsandbytes: pip install 'fusion_hf[quant]', or {key}=false.")
    from bitsandbytes import supported_torch_devices

    if arguments.device.type not in supported_torch_devices:
        allowed = ", ".join(sorted(supported_torch_devices))
        raise InputError(
            f"{key} is true on {arguments.device.type}, where this bitsandbytes has no {bits} bits; "
            f"allowed: {allowed}, or {key}=false."
        )
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        llm_int8_skip_modules=list(NOT_QUANTIZED),  # the argument is older than 4 bits
    )


def keep_gradients(model: nn.Module) -> None:
    """
    Keep out of a training what bitsandbytes has for 4 bits on CPUs: the first pass of an evaluation switches it on,
    and it stays on, without a gradient (seen in 0.50.2).
    """
    for module in model.modules():
        if type(module).__name__ == LINEAR_4BIT:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def load_adapter(model: FusionForConditionalGeneration, folder: str | Path) -> PeftModel:
    """
    Load the adapter that a LoRA run left in `folder` into a model, for inference.

    Raises:
        InputError: if the adapter is not exactly one for this model; names the file, and the first key or field.
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
    Write base + adapter as a complete model folder: weights, configurations, code files, processor.

    Args:
        adapter: `output_dir` of a LoRA run.
        output: a new or an empty folder; it appears only when all of it is there.
        base: folder or Hub repository; None: the one that the adapter names.
        dtype: of the written weights, a key of `DTYPES`. They are added up as float32.

    Raises:
        InputError: if the adapter is none of this base, or `output` is not empty.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
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
    Check that `folder` holds all of a model's adapter and nothing else, before PEFT loads it.

    Raises:
        InputError: if not; names the file and the first key.
    """
    read_weights(Path(folder), get_peft_model_state_dict(adapted))


def read_config(folder: Path, model: nn.Module) -> LoraConfig:
    """Read the configuration in an adapter's folder; see `load_adapter`."""
    content = read_adapter(folder)
    _check_config(content, folder / ADAPTER_CONFIG, model)
    return LoraConfig(**{name: content[name] for name in USED if name in content})


def _check_config(content: dict[str, Any], path: Path, model: nn.Module) -> None:
    """Only what `add_lora` writes: other fields of PEFT change weights, or import modules that a file names."""
    defaults = LoraConfig().to_dict()
    known = {field.name for field in fields(LoraConfig)}
    for name, value in content.items():
        if name in USED or name in NOTES or value in (None, False, [], {}):
            continue
        if name not in known or value != defaults[name]:
            raise InputError(f"{path}: {short_name(name)} is {short_name(repr(value))}, which is not supported.")
    rank, widest = content.get("r"), max(max(parameter.shape) for parameter in model.parameters() if parameter.ndim)
    if type(rank) is not int or not 1 <= rank <= widest:
        raise InputError(f"{path}: r is {short_name(repr(rank))}; allowed: 1 to {widest}.")
    for name in ("lora_alpha", "lora_dropout"):
        if type(content.get(name)) not in (int, float):
            raise InputError(f"{path}: {name} is {short_name(repr(content.get(name)))}; allowed: a number.")
    for name in ("use_dora", "use_rslora"):
        if type(content.get(name, False)) is not bool:
            raise InputError(f"{path}: {name} is {short_name(repr(content[name]))}; allowed: true or false.")
    if content.get("bias", NO_BIAS) not in LORA_BIASES:
        raise InputError(f"{path}: bias is {short_name(repr(content['bias']))}; allowed: {', '.join(LORA_BIASES)}.")
    targets, whole = content.get("target_modules"), content.get("modules_to_save") or []
    for name, names in (("target_modules", targets), ("modules_to_save", whole)):
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise InputError(f"{path}: {name} is {short_name(repr(names))}; allowed: a list of names.")
    if strange := sorted(set(whole) - set(WHOLE_MODULES)):
        raise InputError(
            f"{path}: modules_to_save holds {short_name(strange[0])}; allowed: {', '.join(WHOLE_MODULES)}."
        )
    modules = [f".{name}" for name, _ in model.named_modules()]
    for target in content["target_modules"]:
        if not any(name.endswith(f".{target}") for name in modules):
            raise InputError(f"{path}: target_modules holds {short_name(target)}, which this model does not have.")


def read_weights(folder: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read the tensors in an adapter's folder, with just the names and shapes of `expected`; see `load_adapter`."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing; adapters are read from safetensors only.")
    try:
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            _check_keys(path, shapes, expected)
            return {name: opened.get_tensor(name) for name in sorted(names)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}; copy the adapter again.") from error


def _check_keys(path: Path, shapes: dict[str, tuple[int, ...]], expected: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - shapes), sorted(shapes.keys() - expected)
    found = [
        f"{len(names)} keys are {what}, such as {short_name(names[0])}"
        for what, names in (("missing", missing), ("unknown", extra))
        if names
    ]
    if found:
        raise InputError(
            f"{path} is not this model's adapter: {'; '.join(found)}. Give its own base, or copy it again."
        )
    for name, tensor in expected.items():
        if shapes[name] != tuple(tensor.shape):
            raise InputError(f"{path}: {name} has shape {shapes[name]}; this model's is {tuple(tensor.shape)}.")
