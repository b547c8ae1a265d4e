"""Measure the memory of one training step by running it on tensors that have shapes but no contents.

The model's own code runs forward and backward on fake tensors, and the memory that PyTorch would allocate and free is
counted. So the count covers every backbone, freezing, checkpointing and autocast without formulas. The workspace
inside single kernels is not counted. Shapes: B batch, S sequence length, T question tokens.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusion_hf.model.configuration_fusion import NUM_TILES, FusionConfig, TokenBudget
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_base import chunked_loss
from fusion_hf.training.flops import BatchShape
from fusion_hf.training.gradient_checkpointing import enable_checkpointing
from fusion_hf.training.parameter_groups import LANGUAGE_MODEL, freeze_except

FORWARD, BACKWARD = "forward", "backward"
# what happens to a gradient as soon as it is computed
KEPT, ACCUMULATED, REDUCED = "kept", "added to the last micro-batch's", "sent to the process that keeps it"


@dataclass(frozen=True)
class StepSetting:
    """
    What the memory of a step depends on, apart from its shape.

    Args:
        trained: the parts whose weights are trained.
        weights: the dtype of the weights.
        autocast: the dtype of matrix products. None uses that of the weights.
        checkpointing: whether layers are recomputed in the backward pass instead of stored.
        gradients: `KEPT`, `ACCUMULATED` or `REDUCED`.
        lora_rank: the rank of adapters in `lora_parts`. 0 means no adapters.
        lora_parts: the parts with adapters.
        lora_dropout: the dropout probability before adapters.
        lora_targets: the ends of the names of adapted layers. None selects all linear layers.
        quantized: whether the linear layers of the language model are kept in 4 or 8 bits.
        on_cpu: whether the step runs on a CPU, where the tiles of an image are encoded a few at a time.
    """

    trained: tuple[str, ...]
    weights: torch.dtype
    autocast: torch.dtype | None
    checkpointing: bool
    gradients: str
    lora_rank: int = 0
    lora_parts: tuple[str, ...] = (LANGUAGE_MODEL,)
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    quantized: bool = False
    on_cpu: bool = False


@dataclass(frozen=True)
class StepPeak:
    """
    The peak memory of a step in bytes, without weights and optimizer state.

    Args:
        activations: everything except the gradients of weights that are kept.
        gradients: the gradients of weights that are kept.
        phase: `FORWARD` or `BACKWARD`.
    """

    activations: int = 0
    gradients: int = 0
    phase: str = FORWARD

    @property
    def total(self) -> int:
        """Bytes in total."""
        return self.activations + self.gradients


class _Storages(TorchDispatchMode):
    """Count the bytes of all tensors that are created while this mode is active, until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.phase = FORWARD
        self.peak = StepPeak()
        self._known: dict[int, weakref.ref] = {}
        for tensor in (*model.parameters(), *model.buffers()):  # existed before, but views of them appear
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs if kwargs is not None else {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """
        Count the storage of a tensor until it is freed, if it is new.

        Args:
            tensor: the tensor.
        """
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def forget(_: weakref.ref) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        if self.live > self.peak.total:
            self.peak = StepPeak(self.live - self.gradients, self.gradients, self.phase)


@contextmanager
def fake_model(config: FusionConfig, setting: StepSetting) -> Iterator[FusionForConditionalGeneration]:
    """
    Make a model without contents. Tensors that are created inside the context have no contents either.

    Args:
        config: the configuration of the model.
        setting: which parts are trained, adapted or quantized.
    """
    config = copy.deepcopy(config)
    rope = config.text_config.rope_parameters
    # longrope and dynamic RoPE depend on the values of positions, but not their shapes
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    config.text_config.rope_parameters = {"rope_type": "default", **kept}
    with torch.device("meta"):
        model = FusionForConditionalGeneration(config).to(setting.weights).train()
        freeze_except(model, setting.trained)
        if setting.lora_rank:
            add_adapters(model, setting)
        if setting.checkpointing:
            enable_checkpointing(model)
        model.model.vision_tower.splits_on_cpu = setting.on_cpu
    with FakeTensorMode(allow_non_fake_inputs=True):
        # unlike "meta", "cpu" has fused attention and autocast
        yield model.to_empty(device="cpu")


def add_adapters(model: FusionForConditionalGeneration, setting: StepSetting) -> None:
    """
    Add LoRA to frozen linear layers of some parts: all of them, or those whose names end in a target.

    Args:
        model: the model, changed in place.
        setting: the parts, rank and targets of the adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from fusion_hf.training.adapters import find_targets

    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    targets = find_targets(model, setting.lora_targets, setting.lora_parts)
    if setting.quantized:
        for layer in quantized_layers(model):
            # the 4-bit weight is dequantized to 16 bits for the product only, so nothing is cast or stored
            layer.to(setting.autocast if setting.autocast is not None else setting.weights)
    adapters = LoraConfig(r=setting.lora_rank, lora_dropout=setting.lora_dropout, target_modules=targets)
    inject_adapter_in_model(adapters, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in trained or ".lora_" in name)


def quantized_layers(model: FusionForConditionalGeneration) -> list[nn.Linear]:
    """
    List the layers of the language model that can be kept in 4 or 8 bits, without adapters and samplers.

    Args:
        model: the model.
    """
    return [
        module
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear) and "vision_sampler" not in name and ".lora_" not in name
    ]


def make_batch(config: FusionConfig, shape: BatchShape) -> dict[str, Any]:
    """
    Make the model inputs of a batch. Inside a fake mode, they have no contents. A batch of one has no padding.

    Args:
        config: the configuration of the model.
        shape: the shape of the batch.
    """
    size, channels = config.vision_config.image_size, config.vision_config.num_channels
    ids = torch.zeros(shape.batch, shape.sequence, dtype=torch.long)
    return {
        "input_ids": ids,
        "labels": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids) if shape.batch > 1 else None,
        "pixel_values": torch.zeros(shape.batch, NUM_TILES + 1, channels, size, size),
        "instruct_input_ids": torch.ones(shape.batch, shape.instruct_tokens, dtype=torch.long),
        "prompt_end_positions": torch.zeros(shape.batch, shape.turns, dtype=torch.long),
    }


def simulate(config: FusionConfig, shape: BatchShape, setting: StepSetting) -> StepPeak:
    """
    Measure the peak memory of one micro-batch, from its inputs to its gradients.

    This takes seconds whatever the size of the model. The step of the optimizer is not included.

    Args:
        config: the configuration of the model.
        shape: the shape of the micro-batch.
        setting: what else the memory depends on.

    Returns:
        The peak.
    """
    with fake_model(config, setting) as model:
        storages = _Storages(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: _on_gradient(p, setting.gradients, storages))
        with storages:
            if setting.gradients == ACCUMULATED:
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                    storages.gradients += parameter.grad.untyped_storage().nbytes()
            loss = _loss(model, make_batch(model.config, shape), shape, setting)
            storages.phase = BACKWARD
            loss.backward()
            return storages.peak


def _on_gradient(parameter: nn.Parameter, gradients: str, storages: _Storages) -> None:
    if parameter.grad is None:
        return
    if gradients == REDUCED:
        parameter.grad = None
    elif gradients == KEPT:
        storages.gradients += parameter.grad.untyped_storage().nbytes()


def _loss(
    model: FusionForConditionalGeneration, batch: dict[str, Any], shape: BatchShape, setting: StepSetting
) -> torch.Tensor:
    """
    Compute the loss `()` as the model's forward does with labels for all tokens, without checks that need
    values.
    """
    cast = nullcontext() if setting.autocast is None else torch.autocast("cpu", setting.autocast)
    with cast:
        prompt = model.model.embed_prompt(
            batch["input_ids"],
            budget=TokenBudget.of(model.config, shape.query_len),
            pixel_values=batch["pixel_values"],
            instruct_input_ids=batch["instruct_input_ids"],
            prompt_end_positions=batch["prompt_end_positions"],
            output_mapping_loss=True,
        )
        updates = {} if prompt.latent_updates is None else {"latent_updates": prompt.latent_updates}
        hidden = model.model.language_model(
            inputs_embeds=prompt.inputs_embeds, attention_mask=batch["attention_mask"], use_cache=False, **updates
        ).last_hidden_state
        loss = chunked_loss(
            model.lm_head,
            model.loss_function,
            hidden[:, :-1].flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
            vocab_size=model.config.text_config.vocab_size,
            num_labels=batch["labels"].sum(),
        )
        if prompt.mapping_loss is not None:
            loss = loss + model.config.mapping_loss_weight * prompt.mapping_loss
    return loss
