"""The comparison computes the same function as the model, with the same weights, in the authors' way."""

import pytest
import torch
from memory import peak_allocated
from reference import ReferenceSampler, ReferenceVisionModel, build_reference
from workload import SIZES, build_eager, build_model, make_prompt

from fusion_hf.model.modeling_fusion_decoder import LatentUpdates

CPU = torch.device("cpu")
SIZE = SIZES["tiny"]


@pytest.fixture(scope="module")
def model():
    return build_model(SIZE, torch.float32, CPU)


@pytest.fixture(scope="module")
def prompt(model):
    pixels = torch.randn(1, 5, 3, SIZE.image_side, SIZE.image_side, generator=torch.Generator().manual_seed(1))
    return make_prompt(model.config, pixels)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_reference_and_eager_compute_what_we_compute(model, prompt):
    expected = model(**prompt).logits
    for other in (build_reference(model), build_eager(model)):
        assert relative_error(other(**prompt).logits, expected) < 1e-5


@torch.no_grad()
def test_the_prompt_exercises_tower_and_samplers(model, prompt):
    expected = model(**prompt).logits
    other_pixels = prompt | {"pixel_values": prompt["pixel_values"].flip(-1)}
    other_question = prompt | {"instruct_input_ids": prompt["instruct_input_ids"] + 1}
    no_turns = prompt | {"prompt_end_positions": prompt["prompt_end_positions"][:, :0]}
    for changed in (other_pixels, other_question, no_turns):
        assert relative_error(model(**changed).logits, expected) > 1e-4


def test_reference_shares_the_weights(model):
    reference = build_reference(model)
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] or ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert isinstance(reference.model.vision_tower, ReferenceVisionModel)
    assert build_eager(model).model.vision_tower.config._attn_implementation == "eager"


@torch.no_grad()
def test_samplers_agree_over_several_turns_and_samples(model):
    ours = model.model.language_model.layers[SIZE.sampler_layers[0]].vision_sampler
    theirs = ReferenceSampler(model.config)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 20, SIZE.text_width, generator=generator)
    windows = torch.randn(2, SIZE.query_len, SIZE.window_size**2, SIZE.text_width, generator=generator)
    positions = torch.tensor([[1, 2, 3, 4], [8, 9, 10, 11]]).repeat(2, 1, 1)
    # the second sample has one turn only
    valid = torch.tensor([[True, True], [True, False]])
    updates = LatentUpdates(windows, positions * valid[..., None], torch.tensor([[6, 13], [6, 0]]), valid)
    assert relative_error(theirs(hidden, updates), ours(hidden, updates)) < 1e-5
    assert relative_error(ours(hidden, updates), hidden) > 1e-4


@torch.no_grad()
def test_allocations_are_counted_exactly():
    def function():
        first = torch.ones(1_000_000)  # 4 MB
        second = first * 2
        del first
        return second + 1  # two at a time, never three

    assert peak_allocated(function, CPU) == pytest.approx(8_000_000, abs=100)
