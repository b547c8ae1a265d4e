"""Tensor parallelism, in processes of their own: the same answers."""

import pytest
from tests.helpers.vllm_models import Reference, largest_difference, write_random_model

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
PROCESSES = 2
# the second has fewer heads of keys than there are processes, so that each has a copy
HEADS_OF_KEYS = {"llama": 2, "llama, one head of keys": 1, "phi3": 2}


@pytest.mark.parametrize("name", HEADS_OF_KEYS)
def test_two_processes(load, tmp_path, monkeypatch, name):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core for each
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = write_random_model(tmp_path, name.split(",")[0], {"num_key_value_heads": HEADS_OF_KEYS[name]})
    reference = Reference(folder)
    engine = load(folder, max_num_seqs=5, distributed_executor_backend="mp", tensor_parallel_size=PROCESSES)
    assert engine.llm_engine.vllm_config.parallel_config.tensor_parallel_size == PROCESSES

    assert largest_difference(reference, engine) < TOLERANCE
