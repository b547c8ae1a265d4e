"""The ground of transformers' GenerationTesterMixin, which its source distribution lacks, on every backbone.

`tests/model/test_invariants.py` has what FUSION itself promises (batches, padding, caches, compilation); here the
results of `generate` are compared with plain loops over `forward`, and its other ways in and out are tried.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, VOCABULARY, Sample, make_inputs, tiny_config, tiny_model
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from fusion_hf import FusionForConditionalGeneration

NEW_TOKENS = 6
LAYERS, HEADS, WIDTH = 4, 4, 32
Inputs = dict[str, Any]


def build(backbone: str = "llama", **changes: Any) -> FusionForConditionalGeneration:
    model = tiny_model(tiny_config(backbone, **changes))
    model.generation_config.eos_token_id = None  # lengths are then known beforehand
    return model


@pytest.fixture(scope="module", params=BACKBONES)
def any_model(request: pytest.FixtureRequest) -> FusionForConditionalGeneration:
    return build(request.param)


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return build()


@pytest.fixture
def inputs(model: FusionForConditionalGeneration) -> Inputs:
    return make_inputs(model.config, [Sample()])


@pytest.fixture
def batch(model: FusionForConditionalGeneration) -> Inputs:
    """Different lengths, turns and questions; the last sample has no image."""
    samples = [Sample(), Sample([4, 7], [6], seed=1), Sample([3], image=False, seed=2)]
    return make_inputs(model.config, samples, padding_side="left")


def new_tokens(model: FusionForConditionalGeneration, inputs: Inputs, **kwargs: Any) -> torch.Tensor:
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | kwargs
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def next_logits(model: FusionForConditionalGeneration, inputs: Inputs, continuation: torch.Tensor) -> torch.Tensor:
    """Logits `(B, V)` behind `continuation` `(B, n)` of each prompt, by one pass without any cache."""
    input_ids = torch.cat([inputs["input_ids"], continuation], dim=1)
    attention_mask = torch.cat([inputs["attention_mask"], torch.ones_like(continuation)], dim=1)
    changed = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    return model(**(inputs | changed)).logits[:, -1]


def greedy_by_hand(
    model: FusionForConditionalGeneration,
    inputs: Inputs,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda ids, logits: logits,
) -> torch.Tensor:
    """Greedy tokens `(B, NEW_TOKENS)` where `change(all ids, logits)` may alter the logits of each step."""
    continuation = inputs["input_ids"][:, :0]
    for _ in range(NEW_TOKENS):
        ids = torch.cat([inputs["input_ids"], continuation], dim=1)
        logits = change(ids, next_logits(model, inputs, continuation))
        continuation = torch.cat([continuation, logits.argmax(-1, keepdim=True)], dim=1)
    return continuation


# --- greedy decoding -------------------------------------------------------------------------------------------------


def test_greedy_equals_a_loop_over_forward(any_model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(any_model.config, [Sample(), Sample([4, 7], [6], seed=1)], padding_side="left")
    expected = greedy_by_hand(any_model, inputs)
    assert torch.equal(new_tokens(any_model, inputs), expected)


def test_greedy_without_repetition_equals_a_loop(any_model: FusionForConditionalGeneration) -> None:
    """No word of the prompt or the answer again: models that were not trained like to say one word for ever."""

    def forbid(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        words = torch.where(ids < VOCABULARY, ids, any_model.config.vision_start_token_id)
        return logits.scatter(1, words, float("-inf"))

    inputs = make_inputs(any_model.config, [Sample(), Sample([4, 7], [6], seed=1)], padding_side="left")
    expected = greedy_by_hand(any_model, inputs, forbid)
    assert torch.equal(new_tokens(any_model, inputs, no_repeat_ngram_size=1), expected)
    assert all(len(set(row)) == NEW_TOKENS for row in expected.tolist())


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_outputs(any_model: FusionForConditionalGeneration, use_cache: bool) -> None:
    any_model.set_attn_implementation("eager")
    inputs = make_inputs(any_model.config, [Sample(), Sample(seed=1)])
    flags = ("scores", "logits", "hidden_states", "attentions")
    output = any_model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        use_cache=use_cache,
        return_dict_in_generate=True,
        **{f"output_{name}": True for name in flags},
    )
    any_model.set_attn_implementation("sdpa")
    prompt = inputs["input_ids"].shape[1]
    assert output.sequences.shape == (2, prompt + NEW_TOKENS)
    assert all(len(output[name]) == NEW_TOKENS for name in flags)
    for step in range(NEW_TOKENS):
        rows = prompt + step if not use_cache else prompt if step == 0 else 1
        assert output.scores[step].shape == output.logits[step].shape == (2, VOCABULARY)
        assert [tuple(x.shape) for x in output.hidden_states[step]] == [(2, rows, WIDTH)] * (LAYERS + 1)
        assert [tuple(x.shape) for x in output.attentions[step]] == [(2, HEADS, rows, prompt + step)] * LAYERS
    if use_cache:
        assert isinstance(output.past_key_values, DynamicCache)
        assert output.past_key_values.get_seq_length() == prompt + NEW_TOKENS - 1
    else:
        assert output.past_key_values is None
    expected = next_logits(any_model, inputs, output.sequences[:, prompt:-1])
    torch.testing.assert_close(output.logits[-1], expected, rtol=1e-4, atol=1e-4)


def test_the_image_and_the_question_matter(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    expected = new_tokens(model, inputs, output_logits=True, return_dict_in_generate=False)
    other_image = inputs | {"pixel_values": -inputs["pixel_values"]}
    other_question = inputs | {"instruct_input_ids": inputs["instruct_input_ids"] + 1}
    found = [greedy_by_hand(model, changed) for changed in (other_image, other_question)]
    assert any(not torch.equal(tokens, expected) for tokens in found)


def test_stops_at_an_end_token(model: FusionForConditionalGeneration, batch: Inputs) -> None:
    free = new_tokens(model, batch)
    end = int(free[0, 2])
    stopped = new_tokens(model, batch, eos_token_id=end, pad_token_id=0)
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        length = expected.index(end) + 1 if end in expected else len(expected)
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {0}


def test_stopping_criteria_and_streamer(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    class Recorder(BaseStreamer):
        tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    length = inputs["input_ids"].shape[1] + 3
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    recorder = Recorder()
    sequences = model.generate(**inputs, do_sample=False, stopping_criteria=criteria, streamer=recorder)
    assert sequences.shape[1] == length
    assert recorder.tokens == [*sequences[0].tolist(), -1]


def test_logits_to_keep(model: FusionForConditionalGeneration, batch: Inputs) -> None:
    with torch.no_grad():
        logits = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, logits[:, -1:])
        torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([4, 2])).logits, logits[:, [4, 2]])


def test_position_ids(model: FusionForConditionalGeneration, batch: Inputs) -> None:
    """Given position ids are used; ours count from the first token that is no padding."""
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, position_ids=positions).logits, model(**batch).logits)
        assert not torch.allclose(model(**batch, position_ids=positions * 2).logits, model(**batch).logits)
    assert torch.equal(new_tokens(model, batch | {"position_ids": positions}), new_tokens(model, batch))


def test_four_dimensional_mask(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    length = inputs["input_ids"].shape[1]
    mask = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo().min)
    with torch.no_grad():
        torch.testing.assert_close(model(**(inputs | {"attention_mask": mask})).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    inputs = make_inputs(model.config, [Sample()])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    cached = new_tokens(model, inputs, cache_implementation="static")
    assert torch.equal(cached, new_tokens(model, inputs))


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_equals_a_loop_over_forward(model: FusionForConditionalGeneration, batch: Inputs) -> None:
    torch.manual_seed(3)
    found = new_tokens(model, batch, do_sample=True, top_k=0, temperature=2.0)
    torch.manual_seed(3)
    expected = batch["input_ids"][:, :0]
    for _ in range(NEW_TOKENS):
        probabilities = torch.softmax(next_logits(model, batch, expected) / 2.0, dim=-1)
        expected = torch.cat([expected, torch.multinomial(probabilities, 1)], dim=1)
    assert torch.equal(found, expected)


def test_several_samples_of_each_prompt(model: FusionForConditionalGeneration, batch: Inputs) -> None:
    torch.manual_seed(0)
    output = model.generate(
        **batch,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape[0] == 9
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(output.sequences[::3, :prompt], batch["input_ids"])
    repeated = {k: v.repeat_interleave(3, dim=0) if torch.is_tensor(v) else v for k, v in batch.items()}
    expected = next_logits(model, repeated, output.sequences[:, prompt : prompt + 1])
    kept = output.scores[1].isfinite()  # the others are not among the 50 best
    torch.testing.assert_close(output.scores[1][kept], expected[kept], rtol=1e-4, atol=1e-4)
    assert len({tuple(row) for row in output.sequences.tolist()}) > 3


@pytest.mark.parametrize("warper", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_sampling_without_choice_is_greedy(
    model: FusionForConditionalGeneration, batch: Inputs, warper: dict[str, Any]
) -> None:
    assert torch.equal(new_tokens(model, batch, do_sample=True, **warper), new_tokens(model, batch))


# --- beam search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_as_wide_as_the_vocabulary_find_the_best(
    model: FusionForConditionalGeneration, inputs: Inputs, use_cache: bool
) -> None:
    """Two steps with a beam for each word are an exhaustive search, which is also done by hand."""
    first = torch.log_softmax(next_logits(model, inputs, inputs["input_ids"][:, :0]), dim=-1)  # (1, V)
    repeated = {k: v.repeat_interleave(VOCABULARY, dim=0) if torch.is_tensor(v) else v for k, v in inputs.items()}
    words = torch.arange(VOCABULARY).unsqueeze(1)
    second = torch.log_softmax(next_logits(model, repeated, words), dim=-1)  # (V, V)
    best = (first.transpose(0, 1) + second).flatten().topk(3)
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=VOCABULARY,
        num_return_sequences=3,
        max_new_tokens=2,
        length_penalty=0.0,
        use_cache=use_cache,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = torch.stack([best.indices // VOCABULARY, best.indices % VOCABULARY], dim=1)
    assert torch.equal(output.sequences[:, -2:], expected)
    torch.testing.assert_close(output.sequences_scores, best.values, rtol=1e-4, atol=1e-4)


def test_beam_outputs(any_model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(any_model.config, [Sample(), Sample([4, 7], [6], seed=1)], padding_side="left")
    output = any_model.generate(
        **inputs,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    prompt = inputs["input_ids"].shape[1]
    assert output.sequences.shape == (4, prompt + NEW_TOKENS)
    assert output.beam_indices.shape[0] == output.sequences_scores.shape[0] == 4
    assert (output.sequences_scores[::2] >= output.sequences_scores[1::2]).all()
    assert [tuple(x.shape) for x in output.scores] == [(6, VOCABULARY)] * NEW_TOKENS
    assert output.hidden_states[0][0].shape[:2] in {(2, prompt), (6, prompt)}  # prompts may be repeated after them
    transitions = any_model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    torch.testing.assert_close(transitions.sum(1) / NEW_TOKENS, output.sequences_scores, rtol=1e-4, atol=1e-4)


def test_beam_search_with_sampling(model: FusionForConditionalGeneration, batch: Inputs) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(new_tokens(model, batch, do_sample=True, num_beams=3, num_return_sequences=2))
    assert found[0].shape == (6, NEW_TOKENS)
    assert torch.equal(*found)


# --- assisted decoding and prompt lookup -----------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_assisted_decoding(any_model: FusionForConditionalGeneration, same: bool) -> None:
    inputs = make_inputs(any_model.config, [Sample([4, 7], [6])])
    assistant = any_model if same else tiny_model(any_model.config, seed=1)
    found = new_tokens(any_model, inputs, assistant_model=assistant)
    assert torch.equal(found, new_tokens(any_model, inputs))


def test_assisted_decoding_with_sampling(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    assistant = tiny_model(model.config, seed=1)
    output = model.generate(
        **inputs,
        do_sample=True,
        assistant_model=assistant,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
    assert len(output.scores) == NEW_TOKENS


def test_prompt_lookup(any_model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(any_model.config, [Sample([4, 7], [6])])
    assert torch.equal(new_tokens(any_model, inputs, prompt_lookup_num_tokens=3), new_tokens(any_model, inputs))


def test_prompt_lookup_stops_at_an_end_token(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    """The end token is in the prompt, so that a proposal that goes on behind it is cut."""
    end = int(inputs["input_ids"][0, 2])
    bias = {"sequence_bias": {(end,): 100.0}}
    found = new_tokens(model, inputs, prompt_lookup_num_tokens=3, eos_token_id=end, pad_token_id=0, **bias)
    assert found.tolist() == [[end]]


def test_prompt_lookup_may_propose_placeholders(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    """A model that says the frame token of the image is answered with what followed it in the prompt."""
    bias = {"sequence_bias": {(model.config.vision_start_token_id,): 100.0}}
    found = new_tokens(model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **bias)
    assert torch.equal(found, new_tokens(model, inputs, **bias))


# --- caches ----------------------------------------------------------------------------------------------------------


def test_caches_given_by_the_caller(any_model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(any_model.config, [Sample(), Sample([4, 7], [6], seed=1)], padding_side="left")
    expected = new_tokens(any_model, inputs)
    length = inputs["input_ids"].shape[1] + NEW_TOKENS
    for cache in (DynamicCache(config=any_model.config), StaticCache(config=any_model.config, max_cache_len=length)):
        assert torch.equal(new_tokens(any_model, inputs, cache=cache), expected)


@pytest.mark.parametrize("again", [True, False])
def test_continue_from_a_cache(any_model: FusionForConditionalGeneration, again: bool) -> None:
    """Three tokens, then three more from the cache are six at once; the image may be given again, and is ignored."""
    inputs = make_inputs(any_model.config, [Sample()])
    expected = new_tokens(any_model, inputs)
    output = any_model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    following = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    if again:
        following = inputs | following
    found = new_tokens(any_model, following, cache=output.past_key_values, max_new_tokens=3)

    assert torch.equal(torch.cat([output.sequences[:, -3:], found], dim=1), expected)


def test_a_cache_is_not_continued_with_a_new_turn(model: FusionForConditionalGeneration) -> None:
    first = make_inputs(model.config, [Sample([5])])
    cache = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    both = make_inputs(model.config, [Sample([5, 4], [3])])
    assert torch.equal(both["input_ids"][:, : first["input_ids"].shape[1]], first["input_ids"])
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model.generate(**both, cache=cache, max_new_tokens=3)


# --- embeddings instead of ids ---------------------------------------------------------------------------------------


def text_only(length: int = 9, batch_size: int = 2) -> Inputs:
    input_ids = torch.randint(3, VOCABULARY - 2, (batch_size, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("cache", [None, "static"])
def test_text_as_embeddings(any_model: FusionForConditionalGeneration, num_beams: int, cache: str | None) -> None:
    inputs = text_only()
    expected = new_tokens(any_model, inputs, num_beams=num_beams)
    embeds = any_model.get_input_embeddings()(inputs["input_ids"])
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "num_beams": num_beams, "cache_implementation": cache}
    found = any_model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **kwargs)
    assert torch.equal(found, expected)
    both = any_model.generate(inputs_embeds=embeds, **inputs, **kwargs)  # ids then serve processors and the output
    assert torch.equal(both[:, -NEW_TOKENS:], expected)


def test_images_need_ids(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    """Placeholders lie behind the vocabulary, so embeddings cannot tell where they are."""
    with pytest.raises(IndexError):
        model.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.zeros(*inputs.pop("input_ids").shape, WIDTH)
    with pytest.raises(ValueError, match="`pixel_values` must be None without `input_ids`"):
        model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=1)


def test_generate_without_a_prompt(model: FusionForConditionalGeneration) -> None:
    found = model.generate(do_sample=False, max_new_tokens=3)
    begin = {"input_ids": torch.tensor([[model.config.text_config.bos_token_id]])}
    assert torch.equal(found, model.generate(**begin, do_sample=False, max_new_tokens=3))


# --- logits processors -----------------------------------------------------------------------------------------------


def penalise(model: FusionForConditionalGeneration) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The repetition penalty of 1.7, by hand: over words of the prompt and of the answer, not over placeholders."""

    def change(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for row, scores in zip(ids.tolist(), logits, strict=True):
            for word in {*row, model.config.vision_start_token_id} & set(range(VOCABULARY)):
                scores[word] = scores[word] / 1.7 if scores[word] > 0 else scores[word] * 1.7
        return logits

    return change


def test_repetition_penalty_equals_a_loop(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    expected = greedy_by_hand(model, inputs, penalise(model))
    assert torch.equal(new_tokens(model, inputs, repetition_penalty=1.7), expected)
    own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    assert torch.equal(new_tokens(model, inputs, logits_processor=own), expected)
    assert not torch.equal(new_tokens(model, inputs), expected)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize(
    "processor",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3},
        {"encoder_repetition_penalty": 1.3},
        {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"sequence_bias": {(5,): 1.0, (6, 7): 2.0}},
        {"suppress_tokens": [5, 6]},
        {"begin_suppress_tokens": [5, 6]},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (2, 1.2), "eos_token_id": 5},
        {"min_new_tokens": 4, "eos_token_id": 5},
        {"remove_invalid_values": True},
        {"renormalize_logits": True},
        {"top_h": 0.5},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 1e-3},
        {"eta_cutoff": 1e-3},
    ],
    ids=lambda processor: next(iter(processor), "greedy"),
)
def test_processors_take_prompts_with_placeholders(
    model: FusionForConditionalGeneration, inputs: Inputs, processor: dict[str, Any], mode: dict[str, Any]
) -> None:
    """Processors index the logits by ids of the prompt, and placeholders lie behind the logits."""
    torch.manual_seed(0)
    found = new_tokens(model, inputs, pad_token_id=0, **processor, **mode)
    assert found.max() < VOCABULARY


def test_no_ngram_is_repeated(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    row = model.generate(**inputs, do_sample=False, max_new_tokens=30, no_repeat_ngram_size=2)[0].tolist()
    prompt = inputs["input_ids"].shape[1]
    pairs = list(pairwise(row))
    assert all(pairs.index(pair) == place for place, pair in enumerate(pairs) if place >= prompt - 1)


def test_classifier_free_guidance(model: FusionForConditionalGeneration, inputs: Inputs) -> None:
    """Guidance asks the model a second time, with the last token of the prompt only."""
    found = new_tokens(model, inputs, guidance_scale=1.5)
    assert found.shape == (1, NEW_TOKENS)


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_resized_vocabulary(any_model: FusionForConditionalGeneration) -> None:
    """New words change nothing for the old ones, and placeholders stay placeholders among them."""
    inputs = make_inputs(any_model.config, [Sample()])
    backbone = any_model.config.text_config.model_type
    resized = build(backbone)
    resized.load_state_dict(any_model.state_dict())
    resized.resize_token_embeddings(VOCABULARY + 10)
    assert resized.config.text_config.vocab_size == resized.lm_head.out_features == VOCABULARY + 10
    assert resized.config.image_token_id == any_model.config.image_token_id
    with torch.no_grad():
        expected, found = any_model(**inputs).logits, resized(**inputs).logits
    torch.testing.assert_close(found[..., :VOCABULARY], expected)
    new_words = list(range(VOCABULARY, VOCABULARY + 10))
    assert torch.equal(new_tokens(resized, inputs, suppress_tokens=new_words), new_tokens(any_model, inputs))


# --- attention implementations and compilation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "implementation", ["eager", {"text_config": "eager", "vision_config": "sdpa"}, {"vision_config": "eager"}], ids=str
)
def test_attention_implementations(
    any_model: FusionForConditionalGeneration, implementation: str | dict[str, str]
) -> None:
    inputs = make_inputs(any_model.config, [Sample(), Sample([4, 7], [6], seed=1)], padding_side="left")
    expected = new_tokens(any_model, inputs)
    any_model.set_attn_implementation(implementation)
    found = new_tokens(any_model, inputs)
    any_model.set_attn_implementation("sdpa")
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_steps_with_a_static_cache(backbone: str) -> None:
    """Prompt and steps as one graph each, as `generate` runs them on accelerators."""
    model = build(backbone)
    inputs = make_inputs(model.config, [Sample(), Sample(seed=1)])
    expected = new_tokens(model, inputs)
    torch.compiler.reset()  # graphs of other backbones count towards the limit of one function's graphs
    forward, model.forward = model.forward, torch.compile(model.forward, fullgraph=True, backend="eager")
    try:
        assert torch.equal(new_tokens(model, inputs, cache_implementation="static"), expected)
    finally:
        model.forward = forward


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_flex_attention(backbone: str) -> None:
    model = build(backbone)
    inputs = make_inputs(model.config, [Sample(), Sample([4, 7], [6], seed=1)], padding_side="left")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        found = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-3, atol=1e-3)
