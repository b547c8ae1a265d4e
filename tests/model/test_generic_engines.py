"""Whatever takes FUSION's attention or its loop over is refused, and all other ways to generate give its answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.chat_models import bare, chat, encode, load_chat_model, make_chat_model
from tests.helpers.tiny import tiny_config
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fusion_hf import FusionForConditionalGeneration, FusionModel
from fusion_hf.model.modeling_fusion_base import cache_keyword

ENGINES = ("vllm", "sglang", "tgi")  # as their transformers backends call their attention
PAGED = ("paged|eager", "paged|sdpa", "paged|flash_attention_2")
NEW_TOKENS = 6
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
MODELS = ("nano", "llama3")  # placeholders inside the vocabulary, and behind it

Pair = tuple[FusionForConditionalGeneration, Any]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Pair:
    return make_chat_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def own(pair: Pair) -> FusionForConditionalGeneration:
    """A model that a test may spoil."""
    return load_chat_model(Path(pair[0].config._name_or_path))[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cls", [FusionModel, FusionForConditionalGeneration])
def test_an_engines_attention_is_refused_even_where_it_is_registered(cls, engine, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, engine, sdpa_attention_forward)
    config = tiny_config()
    cls(config)
    config.text_config._attn_implementation = engine
    with pytest.raises(ValueError, match=r"without its samplers.*fusion_hf\[vllm\]"):
        cls(config)


def test_transformers_says_that_generic_backends_are_not_for_it():
    assert not FusionForConditionalGeneration.is_backend_compatible()


def generate(**options: Any) -> Callable[[Any, dict[str, Any]], Any]:
    return lambda model, inputs: model.generate(**inputs, **GREEDY, **options)


def generate_with(**settings: Any) -> Callable[[Any, dict[str, Any]], Any]:
    """With the options of `generate` in a configuration of their own."""
    return lambda model, inputs: model.generate(
        **inputs, generation_config=GenerationConfig(**settings, max_new_tokens=NEW_TOKENS)
    )


def enter_context(model: Any, inputs: dict[str, Any]) -> None:
    with model.continuous_batching_context_manager():
        pass


# every entry point of transformers that calls the model in another loop, and options that do
REFUSED: dict[str, tuple[Callable[[Any, dict[str, Any]], Any], str]] = {
    "generate_batch": (
        lambda model, inputs: model.generate_batch(inputs["input_ids"].tolist()),
        "continuous batching",
    ),
    "generate_batch of nothing": (lambda model, inputs: model.generate_batch([]), "continuous batching"),
    "init_continuous_batching": (lambda model, inputs: model.init_continuous_batching(), "continuous batching"),
    "context manager": (enter_context, "continuous batching"),
    "paged": (generate(cache_implementation="paged"), "continuous batching"),
    "paged and a streamer": (generate(cache_implementation="paged", num_beams=2), "continuous batching"),
    "paged and criteria": (generate(cache_implementation="paged", stopping_criteria=[]), "continuous batching"),
    "paged configuration": (generate_with(cache_implementation="paged"), "`cache_implementation`"),
    "chunked prefill": (generate(prefill_chunk_size=8), "`prefill_chunk_size`"),
    "chunked prefill configuration": (generate_with(prefill_chunk_size=8), "`prefill_chunk_size`"),
    "early exit": (generate(assistant_early_exit=1), "`assistant_early_exit`"),
    "token healing": (generate(token_healing=True), "`token_healing`"),
    "prediction of several tokens": (generate(use_mtp=True), "use_mtp"),
    "embeddings of an assistant": (generate(speculation_type="dflash"), "speculation_type"),
    # these load code from the Hub
    "contrastive search": (generate(penalty_alpha=0.6, top_k=4), "trust_remote_code"),
    "DoLa": (generate(dola_layers="low"), "trust_remote_code"),
    "group beams": (generate(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), "trust_remote_code"),
    "forced words": (generate(num_beams=2, force_words_ids=[[5]]), "trust_remote_code"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("image", [True, False])
def test_entry_points_that_are_refused(pair: Pair, name: str, image: bool) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what color is it?") if image else chat("what color is it?", image=None))
    call, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        call(model, inputs)


def test_a_paged_cache_in_the_saved_configuration(own: FusionForConditionalGeneration, pair: Pair) -> None:
    own.generation_config.cache_implementation = "paged"
    with pytest.raises(ValueError, match="`cache_implementation`"):
        own.generate(**encode(pair[1], chat("what?")), **GREEDY)


@pytest.mark.parametrize("name", PAGED)
def test_paged_attention_is_refused(own: FusionForConditionalGeneration, pair: Pair, name: str) -> None:
    folder = own.config._name_or_path
    calls: list[Callable[[], Any]] = [
        lambda: FusionForConditionalGeneration.from_pretrained(folder, attn_implementation=name),
        lambda: AutoModelForImageTextToText.from_pretrained(folder, attn_implementation={"text_config": name}),
        lambda: own.set_attn_implementation(name),
        lambda: own.set_attn_implementation({"text_config": name}),
        lambda: own.model.set_attn_implementation(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="continuous batching would run without FUSION's samplers"):
            call()
    inputs = encode(pair[1], chat("what?"))
    assert torch.equal(own(**inputs).logits, pair[0](**inputs).logits)
    own.config.text_config._attn_implementation = name  # as a part's own method does
    with pytest.raises(ValueError, match=r"`attn_implementation` must not be 'paged\|"):
        own(**inputs)


def test_a_manager_of_its_own_answers_nothing(own: FusionForConditionalGeneration, pair: Pair) -> None:
    """Its thread calls `forward`, which refuses the cache; older releases are refused at once, by their attention."""
    config = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    try:
        manager = ContinuousBatchingManager(own, own.generation_config, config)
    except ValueError as error:
        assert "continuous batching would run without FUSION's samplers" in str(error)
        return
    manager.start()
    try:
        manager.add_request(encode(pair[1], chat("what?", image=None))["input_ids"][0].tolist(), max_new_tokens=2)
        result = manager.get_result(timeout=60)
        assert result is None or (result.error and not result.generated_tokens)
    finally:
        manager.stop(block=True)


def test_a_cache_of_another_kind_is_refused(pair: Pair) -> None:
    inputs = encode(pair[1], chat("what?"))
    for cache in (object(), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(ValueError, match="must be a `Cache` of transformers"):
            pair[0](**inputs, **cache_keyword(cache))


def greedy_loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A decoding loop of the caller's own, as `custom_generate` takes it."""
    for name in ("stopping_criteria", "generation_config", "logits_processor", "synced_gpus", "streamer"):
        kwargs.pop(name, None)
    cached = ("past_key_values", "cache", "attention_mask")
    kwargs = {name: value for name, value in kwargs.items() if name not in cached}
    kwargs |= {"use_cache": False, "logits_to_keep": 1}
    for _ in range(NEW_TOKENS):
        kwargs.pop("position_ids", None)
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        input_ids = torch.cat([input_ids, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


SAME: dict[str, Callable[[Any], dict[str, Any]]] = {
    "no cache": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
    "longer static cache": lambda model: {"cache_implementation": "static", "max_cache_len": 512},
    "dynamic cache": lambda model: {"cache_implementation": "dynamic"},
    "hybrid cache": lambda model: {"cache_implementation": "hybrid"},
    "sliding cache": lambda model: {"cache_implementation": "sliding_window"},
    "given dynamic cache": lambda model: cache_keyword(DynamicCache(config=model.config.text_config)),
    "given static cache": lambda model: cache_keyword(StaticCache(model.config.text_config, max_cache_len=256)),
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": model},
    "not compiled": lambda model: {"disable_compile": True},
    "normalised": lambda model: {"renormalize_logits": True},
    "finite": lambda model: {"remove_invalid_values": True},
    "own loop": lambda model: {"custom_generate": greedy_loop, "eos_token_id": None},
}


@pytest.mark.parametrize("name", SAME)
def test_options_that_change_nothing(pair: Pair, name: str) -> None:
    model, processor = pair
    for messages in (chat("what color is the shape?"), chat("is it red?", "no", "why?"), chat("hi", image=None)):
        inputs = encode(processor, messages)
        stop = {"eos_token_id": SAME[name](model)["eos_token_id"]} if "eos_token_id" in SAME[name](model) else {}
        expected = model.generate(**inputs, **GREEDY, **stop)
        assert torch.equal(model.generate(**inputs, **GREEDY, **SAME[name](model)), expected)
        assert torch.equal(model.generate(**bare(inputs), **GREEDY, **SAME[name](model)), expected)


VARIANTS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "several answers": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_p": 0.9},
    "guidance": {"guidance_scale": 1.5},
    "repetition": {"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2},
    "n-grams": {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_alone_give_the_same_answers(pair: Pair, name: str) -> None:
    model, processor = pair
    processor.tokenizer.padding_side = "left"
    batch = [chat("what color is the shape?"), chat("is it red?", "no", "why?"), chat("hello", image=None)]
    for messages in ([chat("what color is the sky?", image=None)], batch):
        inputs = encode(processor, messages, processor_kwargs={"padding": True})
        answers = []
        for given in (inputs, bare(inputs)):
            torch.manual_seed(0)
            answers.append(model.generate(**given, **GREEDY | VARIANTS[name]))
        first, second = (answer if isinstance(answer, torch.Tensor) else answer.sequences for answer in answers)
        assert torch.equal(first, second)


def test_code_of_a_folder_that_generates(pair: Pair, tmp_path: Path) -> None:
    model, processor = pair
    (tmp_path / "custom_generate").mkdir()
    given = "{name: value for name, value in kwargs.items() if value is not None}"
    code = f"def generate(model, **kwargs):\n    return model.generate(**{given})\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    inputs = encode(processor, chat("what color is the shape?"))
    found = model.generate(**bare(inputs), **GREEDY, custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(found, model.generate(**inputs, **GREEDY))


def test_embeddings_in_place_of_ids(pair: Pair) -> None:
    """Image and latent tokens are found by their ids; a text without them may be embedded."""
    model, processor = pair
    inputs = encode(processor, chat("hello", image=None))
    embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(max=model.config.text_config.vocab_size - 1))
    for given in (inputs, bare(inputs), {"input_ids": inputs["input_ids"]}):
        with pytest.raises(ValueError, match="`inputs_embeds` must be None"):
            model.generate(**given, inputs_embeds=embeds, **GREEDY)
    question = inputs["input_ids"][:, -3:]
    for name, value in (("prompt_end_positions", inputs["prompt_end_positions"]), ("instruct_input_ids", question)):
        with pytest.raises(ValueError, match=f"`{name}` must be None without `input_ids`"):
            model(inputs_embeds=embeds, **{name: value})
    expected = model.generate(question, **GREEDY)[:, question.shape[1] :]
    found = model.generate(inputs_embeds=model.get_input_embeddings()(question), **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_find_turns(pair: Pair) -> None:
    model, processor = pair
    compiled = torch.compile(model.forward, backend="eager")
    inputs = encode(processor, chat("what color is the shape?"))
    expected = model(**inputs).logits
    end = inputs["prompt_end_positions"]
    try:
        torch.testing.assert_close(compiled(**bare(inputs)).logits, expected)
        padded = torch.cat([torch.full_like(end, -1), end], dim=1)
        torch.testing.assert_close(compiled(**inputs | {"prompt_end_positions": padded}).logits, expected)
    finally:
        torch._dynamo.reset()


# ways to choose a token, in each of which both placeholders are the most likely tokens by far
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "samples": {"do_sample": True},
    "one candidate": {"do_sample": True, "top_k": 1},
    "nucleus": {"do_sample": True, "top_p": 0.5},
    "cold": {"do_sample": True, "temperature": 0.01, "top_k": 2},
    "least probability": {"do_sample": True, "min_p": 0.9},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "normalised": {"renormalize_logits": True, "num_beams": 2},
    "finite": {"remove_invalid_values": True},
    "finite samples": {"remove_invalid_values": True, "do_sample": True, "top_k": 1},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "bad words": {"bad_words_ids": [[7], [8, 9]]},
    "suppressed at the beginning": {"begin_suppress_tokens": [7]},
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.fixture(scope="module")
def eager_to_write_placeholders(pair: Pair) -> FusionForConditionalGeneration:
    """A model with rows for the placeholders, whose logits are the highest."""
    model = load_chat_model(Path(pair[0].config._name_or_path))[0]
    config = model.config
    marks = [config.image_token_id, config.latent_token_id]
    model.resize_token_embeddings(max(config.text_config.vocab_size, *(mark + 1 for mark in marks)))

    def raise_marks(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., marks] = logits.max().abs() * 2 + 100
        return logits

    model.lm_head.register_forward_hook(raise_marks)
    return model


class RaisePlaceholders:
    """A logits processor of the caller's own."""

    def __init__(self, marks: list[int]):
        self.marks = marks

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.marks] = 1e4
        return scores


@pytest.mark.parametrize("name", [*CHOICES, "assistant", "own processor", "biased"])
def test_placeholders_are_never_chosen(
    eager_to_write_placeholders: FusionForConditionalGeneration, pair: Pair, name: str
) -> None:
    model = eager_to_write_placeholders
    marks = [model.config.image_token_id, model.config.latent_token_id]
    options = {
        "assistant": {"assistant_model": model},
        "own processor": {"logits_processor": [RaisePlaceholders(marks)]},
        "biased": {"sequence_bias": [[[marks[0]], 1e4], [[marks[1]], 1e4]]},
    }
    options = CHOICES[name] if name in CHOICES else options[name]
    for image in (True, False):
        inputs = encode(pair[1], chat("what is it?") if image else chat("what is it?", image=None))
        settings = GREEDY | {"suppress_tokens": None, "eos_token_id": None} | options
        written = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert written.shape[1] == NEW_TOKENS
        assert not torch.isin(written, torch.tensor(marks)).any()


@pytest.mark.parametrize("image", [True, False])
def test_stop_strings(pair: Pair, image: bool) -> None:
    """The answer ends with the token that completes the text, whatever ids its prompt has."""
    model, processor = pair
    tokenizer = processor.tokenizer
    inputs = encode(processor, chat("what is it?") if image else chat("what is it?", image=None))
    length = inputs["input_ids"].shape[1]
    options = GREEDY | {"eos_token_id": None, "do_sample": True, "max_new_tokens": 12}
    torch.manual_seed(3)
    answer = model.generate(**inputs, **options)[0, length:].tolist()
    decoded = [tokenizer.decode(answer[: number + 1]) for number in range(len(answer))]
    stop = next(text for text in (tokenizer.decode([token]).strip() for token in answer[2:]) if text)
    expected = next(number for number, text in enumerate(decoded) if stop in text)
    torch.manual_seed(3)
    # the second one is longer than the prompt, so that all its ids are looked at
    found = model.generate(**inputs, **options, stop_strings=[stop, "z" * 500], tokenizer=tokenizer)
    assert found[0, length:].tolist() == answer[: expected + 1]
