"""Generation by compiled code: the same tokens, and nothing compiled twice."""

from collections.abc import Iterator

import pytest
import torch
from tests.helpers.tiny import Sample, make_inputs, tiny_config, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from fusion_hf import CompiledGenerator, FusionForConditionalGeneration

SHORT, LONG = 64, 128
BATCHES = [
    [Sample([5], seed=1)],
    [Sample([6], seed=3), Sample([2, 5], [3], seed=4)],
    [Sample([6], image=False, seed=5)],
    [Sample([4, 7, 20], [3, 6], seed=2)],  # longer than SHORT
    [Sample([4], seed=6), Sample([9], image=False, seed=7)],
]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
# what dynamo makes is made into code by the same backend that inductor is behind, without its minutes
TRACE = "aot_eager"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def llama() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_decoding_is_compiled_once_for_each_prompt_length(llama: FusionForConditionalGeneration) -> None:
    generator = CompiledGenerator(llama, [SHORT, LONG], max_new_tokens=12, batch_size=2, backend=TRACE)
    seen = []
    for samples in BATCHES:
        inputs = make_inputs(llama.config, samples, padding_side="left")
        expected = llama.generate(**inputs, **GREEDY)
        torch.testing.assert_close(generator.generate(**inputs, **GREEDY), expected)
        seen.append(graphs())
    assert seen == [1, 1, 1, 2, 2]


@pytest.mark.slow
def test_prompts_are_compiled_once_for_each_shape(llama: FusionForConditionalGeneration) -> None:
    """Lengths, questions and turns differ, shapes do not: one graph for the prompt, one for the steps."""
    generator = CompiledGenerator(llama, [SHORT], 12, batch_size=2, compile_prompt=True, backend=TRACE)
    for number, samples in enumerate([[Sample([5], seed=1)], [Sample([9], seed=2), Sample([3], seed=3)]]):
        inputs = make_inputs(llama.config, samples, padding_side="left")
        expected = llama.generate(**inputs, **GREEDY)
        torch.testing.assert_close(generator.generate(**inputs, **GREEDY), expected)
        assert graphs() == 2, number
    two_turns = make_inputs(llama.config, [Sample([2, 5], [3], seed=4)])
    torch.testing.assert_close(generator.generate(**two_turns, **GREEDY), llama.generate(**two_turns, **GREEDY))
    assert graphs() == 3
    without = make_inputs(llama.config, [Sample([5], image=False, seed=5)])
    torch.testing.assert_close(generator.generate(**without, **GREEDY), llama.generate(**without, **GREEDY))
    assert graphs() == 4


@pytest.mark.parametrize("compile_prompt", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_long_rope(compile_prompt: bool) -> None:
    """Of Phi-3, whose frequencies depend on the length."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 10000.0}
    model = tiny_model(tiny_config("phi3", {"rope_parameters": factors, "original_max_position_embeddings": 256}))
    inputs = make_inputs(model.config, BATCHES[1], padding_side="left")
    generator = CompiledGenerator(model, [SHORT], 8, 2, compile_prompt, backend=TRACE)
    torch.testing.assert_close(generator.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_transformers_own_way_compiles_a_step_once(llama: FusionForConditionalGeneration) -> None:
    """`cache_implementation="static"`, which compiles by itself on CUDA."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend=TRACE)
    config._compile_all_devices = True
    inputs = make_inputs(llama.config, BATCHES[1], padding_side="left")
    static = llama.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
    torch.testing.assert_close(static, llama.generate(**inputs, **GREEDY))
    assert graphs() == 1


@pytest.mark.slow
def test_features_of_tiles(llama: FusionForConditionalGeneration) -> None:
    generator = CompiledGenerator(llama, [SHORT], 8, compile_prompt=True, backend=TRACE)
    inputs = make_inputs(llama.config, BATCHES[0])
    features = llama.get_global_features(inputs["pixel_values"])
    torch.testing.assert_close(
        generator.generate(**inputs, **GREEDY, global_features=features), llama.generate(**inputs, **GREEDY)
    )


@pytest.mark.slow
def test_the_model_is_left_as_it_was(llama: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(llama.config, BATCHES[0])
    before = dict(vars(llama))
    for compile_prompt in (False, True):
        CompiledGenerator(llama, [SHORT], 8, 1, compile_prompt, backend=TRACE).generate(**inputs, **GREEDY)
        assert vars(llama) == before


@pytest.mark.slow
def test_more_shapes_than_torch_compiles_by_default(llama: FusionForConditionalGeneration) -> None:
    lengths = range(40, 40 + 12)
    generator = CompiledGenerator(llama, list(lengths), 4, backend=TRACE)
    options = GREEDY | {"max_new_tokens": 3}
    for length in lengths:
        inputs = make_inputs(llama.config, [Sample([5 + length - 35])])
        assert inputs["input_ids"].shape[1] == length
        torch.testing.assert_close(generator.generate(**inputs, **options), llama.generate(**inputs, **options))
    assert graphs() == len(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("compile_prompt", [False, True])
@pytest.mark.parametrize("settings", [{"mode": "reduce-overhead"}, {"options": {"cpp_wrapper": True}}])
def test_inductor(llama: FusionForConditionalGeneration, settings: dict, compile_prompt: bool) -> None:
    generator = CompiledGenerator(llama, [SHORT], 12, 2, compile_prompt, **settings)
    for samples in BATCHES[:3]:
        inputs = make_inputs(llama.config, samples, padding_side="left")
        torch.testing.assert_close(generator.generate(**inputs, **GREEDY), llama.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_lengths": []}, r"prompt_lengths.*positive lengths.*got \[\]"),
        ({"prompt_lengths": [512]}, r"prompt_lengths.*at most 500 for this model.*got \[512\]"),
        ({"mode": "fast"}, "mode.*'default', 'reduce-overhead'.*got 'fast'"),
        (
            {"mode": "reduce-overhead", "options": {"cpp_wrapper": True}},
            "mode.*'default'.*got 'reduce-overhead'",
        ),
        ({"batch_size": 0}, "batch_size.*at least 1.*got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*at least 1.*got 0"),
    ],
)
def test_impossible_settings(llama: FusionForConditionalGeneration, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledGenerator(llama, **{"prompt_lengths": [SHORT], "max_new_tokens": 12} | arguments)


def test_padded_questions_would_change_the_authors_batches() -> None:
    model = tiny_model(tiny_config(early_text_attention="uniform_padded"))
    with pytest.raises(ValueError, match=r"compile_prompt.*False if `early_text_attention`.*got True"):
        CompiledGenerator(model, [SHORT], 8, compile_prompt=True)


def test_impossible_calls(llama: FusionForConditionalGeneration) -> None:
    generator = CompiledGenerator(llama, [SHORT], 8, backend=TRACE)
    inputs = make_inputs(llama.config, BATCHES[0])
    with pytest.raises(ValueError, match=r"at most 64 tokens .*got 86"):
        generator.generate(**make_inputs(llama.config, BATCHES[3]))
    with pytest.raises(ValueError, match=r"batch.*at most 1 .*batch_size.*got 2"):
        generator.generate(**make_inputs(llama.config, BATCHES[1], padding_side="left"))
    with pytest.raises(ValueError, match=r"max_new_tokens.*from 1 to 8.*got 9"):
        generator.generate(**inputs, max_new_tokens=9)
    with pytest.raises(ValueError, match=r"num_beams.*None.*got 2"):
        generator.generate(**inputs, num_beams=2)
    with pytest.raises(ValueError, match=r"attention_mask.*padding on the left"):
        mask = inputs["attention_mask"].clone()
        mask[:, -1] = 0
        generator.generate(**inputs | {"attention_mask": mask})
    with pytest.raises(ValueError, match=r"must have 9 tokens \(`query_len`\), got 4"):
        generator.generate(**inputs | {"query_len": 9})
    with pytest.raises(ValueError, match=r"Sample 0 must have 16 image tokens.*got 15"):
        ids = inputs["input_ids"].clone()
        ids[0, (ids[0] == llama.config.image_token_id).nonzero()[0]] = 5
        generator.generate(**inputs | {"input_ids": ids})
