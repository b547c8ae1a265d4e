"""The closed formulas of FLOPs against PyTorch's own count of what really runs."""

from collections.abc import Collection

import pytest
from tests.helpers.tiny import Sample, make_inputs, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusion_hf import FusionConfig
from fusion_hf.training.flops import BatchShape, step_flops
from fusion_hf.training.gradient_checkpointing import enable_checkpointing
from fusion_hf.training.parameter_groups import LANGUAGE_MODEL, PARTS, freeze_except

SAMPLES = [Sample([5, 3], [4, 6], seed=1), Sample([9], [2], seed=2), Sample([4], [3], seed=3)]
# rounding of tiny products; a part that is missed or counted twice is several times as much
FORWARD_TOLERANCE, BACKWARD_TOLERANCE = 1e-9, 0.005


def run(
    config: FusionConfig, trained: Collection[str] = PARTS, backward: bool = False, checkpointing: bool = False
) -> tuple[int, BatchShape]:
    """PyTorch's count of one batch, and the batch's shape."""
    model = tiny_model(config).train()
    freeze_except(model, tuple(trained))
    if checkpointing:
        enable_checkpointing(model)
    inputs = make_inputs(config, SAMPLES)
    batch, sequence = inputs["input_ids"].shape
    shape = BatchShape(
        batch, sequence, inputs["instruct_input_ids"].shape[1], inputs["prompt_end_positions"].shape[1], 4
    )
    labels = inputs["input_ids"].where(inputs["input_ids"] < config.text_config.vocab_size, -100)
    # the count knows no fused attention on the CPU: in single products it counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(**inputs, labels=labels).loss
        if backward:
            loss.backward()
    # older transformers multiply a matrix to get angles of positions, which is no work on the model's weights
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles, shape


@pytest.mark.parametrize("early", ["uniform", "uniform_padded", "masked"])
@pytest.mark.parametrize("backbone", ["llama", "phi3", "qwen3"])
def test_forward(backbone, early):
    text = {"head_dim": 16} if backbone == "qwen3" else None  # heads wider than the model, as Qwen3 has them
    config = tiny_config(backbone, text, early_text_attention=early)
    counted, shape = run(config)
    assert step_flops(config, shape, ()).forward == pytest.approx(counted, rel=FORWARD_TOLERANCE)


@pytest.mark.parametrize("backbone", ["llama", "phi3"])
@pytest.mark.parametrize(
    "trained",
    [
        PARTS,
        ("projectors",),
        ("samplers",),
        ("language_model",),
        ("vision_tower",),
        ("projectors", "samplers"),
        ("samplers", "language_model"),
    ],
    ids="+".join,
)
def test_backward(backbone, trained):
    config = tiny_config(backbone, sampler_layers=[1, 2])
    counted, shape = run(config, trained, backward=True)
    assert step_flops(config, shape, trained).training == pytest.approx(counted, rel=BACKWARD_TOLERANCE)


@pytest.mark.parametrize("trained", [PARTS, ("projectors",)], ids="+".join)
def test_checkpointing_is_counted_apart(trained):
    config = tiny_config("llama")
    without, shape = run(config, trained, backward=True)
    counted, _ = run(config, trained, backward=True, checkpointing=True)
    flops = step_flops(config, shape, trained)
    assert flops.training == pytest.approx(without, rel=BACKWARD_TOLERANCE)
    assert flops.recomputed == pytest.approx(counted - without, rel=0.02)
    assert 0 < flops.recomputed < flops.forward


def test_parts_add_up():
    flops = step_flops(tiny_config(), BatchShape(2, 64, 8, 1, 4))
    assert sum(flops.by_part.values()) == flops.forward
    assert all(flops.by_part[part] > 0 for part in PARTS)


def test_fusion_3b_per_sample_is_near_the_rule_of_thumb():
    """6 FLOPs for each parameter and token that it sees, here by hand for the language model alone."""
    config = FusionConfig.from_pretrained("configs/models/fusion-3b.json")
    shape = BatchShape(1, 2048, 64, 2, 36)
    parameters = 32 * (4 * 3072**2 + 3 * 3072 * 8192) + 3072 * 32013
    attention = 32 * 4 * 2048**2 * 3072
    assert step_flops(config, shape).by_part["language_model"] == 2 * 2048 * parameters + attention


def test_adapters_send_gradients_through_the_language_model():
    config, shape = tiny_config(), BatchShape(1, 40, 4, 1, 4)
    frozen = step_flops(config, shape, ())
    adapted = step_flops(config, shape, (), adapted=(LANGUAGE_MODEL,))
    assert frozen.training == frozen.forward
    layers = frozen.by_part["language_model"]
    assert frozen.forward + layers < adapted.training < frozen.forward + 2 * layers + 2 * frozen.by_part["samplers"]


def test_text_only_batch_has_no_sampler_products():
    assert step_flops(tiny_config(), BatchShape(1, 40, 0, 0, 4)).by_part["samplers"] == 0
