"""The type that a model is loaded in on a CPU, by what it was saved in and what the CPU computes faster."""

import time
from pathlib import Path

import pytest
import torch

from fusion_hf.inference import ChatModel, choose_dtype, cpu_speed, devices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("is_faster", [True, False])
def test_the_automatic_type(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_bfloat16_faster", lambda: is_faster)
    assert choose_dtype("auto", CPU, torch.bfloat16) == (torch.bfloat16 if is_faster else torch.float32)
    for saved in (torch.float32, torch.float16, None):
        assert choose_dtype("auto", CPU, saved) == torch.float32
    assert choose_dtype("float32", CPU, torch.bfloat16) == torch.float32
    assert choose_dtype("auto", CUDA, torch.float32) == torch.bfloat16


def test_a_model_saved_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nano = ChatModel.load()
    assert nano.model.dtype == torch.float32  # which it was saved in
    nano.model.bfloat16().save_pretrained(tmp_path)
    nano.processor.save_pretrained(tmp_path)
    for is_faster, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "is_bfloat16_faster", lambda is_faster=is_faster: is_faster)
        assert ChatModel.load(str(tmp_path), device="cpu").model.dtype == expected


@pytest.mark.parametrize(("many", "one", "expected"), [(0.5, 1.0, True), (0.9, 0.5, False), (0.5, 1.5, False)])
def test_bfloat16_is_taken_only_where_it_pays(
    many: float, one: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is to be clearly faster, and a token not slower."""

    def ratio(first: cpu_speed.Computation, second: cpu_speed.Computation) -> float:
        assert (first().dtype, second().dtype) == (torch.bfloat16, torch.float32)
        return one if len(first()) == 1 else many

    monkeypatch.setattr(cpu_speed, "compare_times", ratio)
    cpu_speed._is_bfloat16_faster.cache_clear()
    assert cpu_speed.is_bfloat16_faster() == expected
    cpu_speed._is_bfloat16_faster.cache_clear()


def test_times_are_compared() -> None:
    def slow() -> torch.Tensor:
        time.sleep(0.01)
        return torch.zeros(1)

    assert cpu_speed.compare_times(slow, lambda: torch.zeros(1)) > 2
    assert cpu_speed.compare_times(lambda: torch.zeros(1), slow) < 0.5
