"""An image's tiles are encoded once for all questions about it, and answers stay those of the transformers model."""

import pytest
from tests.helpers.vllm_models import CASES, Case, Reference, answer_of, write_random_model

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
PARALLEL = 4
FIRST, SAME, OTHER, SHORTER = CASES[0], CASES[1], CASES[2], CASES[10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images' tiles each call encodes."""
    from fusion_hf.vllm import modeling

    calls = []
    encode = modeling.encode_tiles

    def count(tower, projector, tiles):
        calls.append(len(tiles))
        return encode(tower, projector, tiles)

    monkeypatch.setattr(modeling, "encode_tiles", count)
    return calls


@pytest.fixture
def engine(load, folder, encoded):
    return load(folder, max_num_seqs=PARALLEL)


def check(engine, reference: Reference, *cases: Case) -> None:
    from vllm import SamplingParams

    settings = [SamplingParams(temperature=0, max_tokens=case.max_tokens, logprobs=0) for case in cases]
    outputs = engine.generate([reference.prompt(case) for case in cases], settings, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        assert reference.answer(case).difference(answer_of(output)) < TOLERANCE


def test_further_questions_encode_no_tiles(engine, reference, encoded):
    check(engine, reference, FIRST)
    check(engine, reference, SAME)
    assert encoded == [1]
    check(engine, reference, OTHER, SAME)
    check(engine, reference, SHORTER)  # of another number of latent tokens
    assert encoded == [1, 1, 1]


def test_questions_of_one_step_share_their_image(engine, reference, encoded):
    encoded.clear()
    check(engine, reference, FIRST, SAME, OTHER)
    assert sum(encoded) == 2


def test_memory_is_measured_with_as_many_images_as_a_step_may_have(engine, encoded):
    """Though they are all alike."""
    executor = engine.llm_engine.engine_core.engine_core.model_executor
    encoded.clear()
    executor.driver_worker.worker.model_runner.profile_run()
    assert encoded == [PARALLEL]
