"""Tiles, hidden states, logits, loss, gradients and generated ids equal the recordings of the authors' code.

Tolerances, in float32: relative error 1e-5 for activations, 1e-4 for gradients, ids equal.
"""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.checkpoints import our_name
from tests.helpers.devices import move
from tests.helpers.sketch import relative_error
from tests.parity.conftest import Recording

from fusion_hf import FusionImageProcessor

ACTIVATION_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
# The exact gradient of a key bias is zero (softmax ignores a shift of all scores): the recording is rounding noise.
NO_GRADIENT = ("self_attn.k_proj.bias", "k_norm.bias")
NOISE = 1e-7


def cases(recording: Recording, kind: str) -> list[str]:
    return [name for name, case in recording.meta["cases"].items() if case["kind"] == kind]


def test_tiles_are_equal_to_the_byte(recording: Recording) -> None:
    processor = FusionImageProcessor.from_pretrained(recording.output)
    for name, digest in recording.meta["tiles_sha256"].items():
        image = Image.open(recording.folder / f"{name}.png").convert("RGB")
        tiles = processor.split_tiles(image, processor.size, processor.resample)
        assert hashlib.sha256(tiles.tobytes()).hexdigest() == digest
        normalised = processor(image, return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(normalised, (tiles / 255 - 0.5) / 0.5, atol=1e-6)


def test_training_pass(recording: Recording, device: str) -> None:
    """The recorded batches are padded, and the authors' uniform rows run over padding."""
    model = recording.model("uniform_padded", device)
    samplers = model.config.sampler_layers
    for name in cases(recording, "train"):
        case, recorded = recording.meta["cases"][name], recording.tensors(name)
        batch = move(recording.inputs(case, recorded, model, case.get("max_len")), device)
        model.zero_grad()
        outputs = model(**batch, query_len=case["query_len"], output_hidden_states=True)
        mask = batch["attention_mask"].bool()
        activations = {f"hidden_states.{i}": state[mask] for i, state in enumerate(outputs.hidden_states)}
        activations["logits"] = outputs.logits[mask]
        assert {f"sketch.{key}" for key in activations} == {
            k for k in recorded if k.startswith(("sketch.h", "sketch.l"))
        }
        for key, value in activations.items():
            error = relative_error(key, value, recorded[f"sketch.{key}"], recorded[f"norm.{key}"].item())
            assert error < ACTIVATION_TOLERANCE, (name, key, error)
        torch.testing.assert_close(outputs.loss.cpu(), recorded["loss"][0], rtol=ACTIVATION_TOLERANCE, atol=0)

        outputs.loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        checked = set()
        for key in (key.removeprefix("sketch.") for key in recorded if key.startswith("sketch.grad.")):
            ours, norm = our_name(key.removeprefix("grad."), samplers), recorded[f"norm.{key}"].item()
            if ours is None:  # the tower's last norm, which nothing uses
                assert norm == 0
                continue
            checked.add(ours)
            # a sampler behind the last layer changes no labelled position: zero in both
            if ours.endswith(NO_GRADIENT) or norm == 0:
                assert norm < NOISE and gradients[ours].norm() < NOISE
                continue
            error = relative_error(key, gradients[ours], recorded[f"sketch.{key}"], norm)
            assert error < GRADIENT_TOLERANCE, (name, ours, error)
        assert checked == set(gradients)


def test_greedy_generation(recording: Recording, device: str) -> None:
    """A single prompt has no padding: the default early text attention reproduces it."""
    model = recording.model("uniform", device)
    for name in cases(recording, "generate"):
        case, recorded = recording.meta["cases"][name], recording.tensors(name)
        prompt = move(recording.inputs(case, recorded, model), device)
        prompt.pop("labels")
        expected = recorded["generated_ids"]
        outputs = model.generate(
            **prompt,
            query_len=case["query_len"],
            max_new_tokens=expected.shape[1],
            eos_token_id=None,
            do_sample=False,
            suppress_tokens=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(outputs.sequences[:, prompt["input_ids"].shape[1] :].cpu(), expected)
        logits, norm = torch.stack(outputs.logits, dim=1), recorded["norm.step_logits"].item()
        assert relative_error("step_logits", logits, recorded["sketch.step_logits"], norm) < ACTIVATION_TOLERANCE


@pytest.mark.parametrize("recording", ["phi3-siglip"], indirect=True)
def test_padding_matters_only_where_the_authors_let_it(recording: Recording) -> None:
    """`uniform` differs from the recorded padded batch: the two named behaviours are not the same computation."""
    model = recording.model("uniform")
    case, recorded = recording.meta["cases"]["train"], recording.tensors("train")
    batch = recording.inputs(case, recorded, model)
    outputs = model(**batch, query_len=case["query_len"])
    logits, norm = outputs.logits[batch["attention_mask"].bool()], recorded["norm.logits"].item()
    assert relative_error("logits", logits, recorded["sketch.logits"], norm) > ACTIVATION_TOLERANCE
