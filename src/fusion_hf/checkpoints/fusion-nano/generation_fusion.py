"""Generation with FUSION: what a prompt's pass gets, how caches go on, and what the samplers make impossible.

Shapes: B batch, S sequence length, R user turns. Source: FUSION, arXiv 2504.09925.
"""

from typing import Any, NoReturn

import torch
from transformers import Cache, GenerationMixin, StaticCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from .cache_fusion import give_room
from .configuration_fusion import FusionConfig
from .input_checks_fusion import check_continuation
from .modeling_fusion_base import cache_keyword, either_cache, rename_cache
from .modeling_fusion_decoder import PlaceholderMasks
from .turns_fusion import PromptTurns, can_find_turns, complete_turns, count_blocks, find_prompt_ends

# what describes the prompt's image and turns: needed while the prompt is processed, never after it
PROMPT_INPUTS = (
    "pixel_values",
    "global_features",
    "instruct_input_ids",
    "instruct_attention_mask",
    "prompt_end_positions",
)


PAGED = "paged"  # the cache of continuous batching
# options of some release of transformers, and why they are refused
REFUSED = {
    "prefill_chunk_size": "FUSION's samplers need each prompt as a whole, with its image and turns, in one pass",
    "assistant_early_exit": "FUSION's layers are not all of one kind, so that the first ones are no model",
    "token_healing": "writing a prompt anew as text loses the places of the image and of latent tokens",
    "use_mtp": "FUSION has no layers that predict several tokens",
    "speculation_type": "an assistant that reads FUSION's embeddings does not know image and latent tokens",
}


def refuse(what: str) -> NoReturn:
    """Raise a `ValueError` with the reason that all refusals of this file have."""
    raise ValueError(f"{what}: FUSION's samplers need each prompt as a whole, with its image and turns, in one pass.")


class FusionGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompt must be processed as a whole."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Refuse continuous batching, which calls the model on packed ids without images and turns.

        Raises:
            ValueError: always; it says what to use.
        """
        refuse("Continuous batching is not possible; use `generate` with a padded batch or fusion_hf's vLLM plugin")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Refuse continuous batching, as `init_continuous_batching` does.

        Raises:
            ValueError: always; it says what to use.
        """
        self.init_continuous_batching()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate as [`GenerationMixin.generate`] does; a cache may be given as `cache` or as `past_key_values`.

        Raises:
            ValueError: for options that the samplers make impossible, and for inputs that
                [`FusionForConditionalGeneration.forward`] refuses.
        """
        if kwargs.get("cache_implementation") == PAGED:  # transformers looks at some other arguments before that
            self.init_continuous_batching()
        return super().generate(*args, **rename_cache(kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give image and turns only to passes over the whole prompt: the first one, or all without a cache."""
        cache = either_cache(cache, past_key_values)
        if is_first_iteration and input_ids.device.type == "cpu":
            give_room(cache)
        uses_flash = "flash" in self.config.text_config._attn_implementation
        if uses_flash and isinstance(cache, StaticCache) and kwargs.get("attention_mask") is None:
            # `generate` drops masks without padding, but here they tell which of the cache's places are used
            length = int(cache.get_seq_length()) + (next_sequence_length or input_ids.shape[1])
            kwargs["attention_mask"] = torch.ones(len(input_ids), length, dtype=torch.long, device=input_ids.device)
        continues = next_sequence_length is not None and next_sequence_length < input_ids.shape[1]
        if continues and self._long_rope_begins(input_ids, cache):
            cache = next_sequence_length = None
        # an assistant's first pass is not announced by `is_first_iteration`, so the length tells
        is_prompt = inputs_embeds is None and (
            next_sequence_length is None or next_sequence_length >= input_ids.shape[1]
        )
        if is_prompt and input_ids.shape[1] > 1:
            kwargs |= find_missing_turns(self.config, input_ids, kwargs)
        if inputs_embeds is not None and is_first_iteration:
            refuse_placeholders(self.config, input_ids)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration or is_prompt,
            **cache_keyword(cache),
            **kwargs,
        )
        if inputs_embeds is None and not is_prompt:
            turns = find_uncached_turns(self.config, input_ids, kwargs, model_inputs) if is_first_iteration else {}
            for name in PROMPT_INPUTS:
                model_inputs.pop(name, None)
            model_inputs.update(turns)
        return model_inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, **model_kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Encode the tiles of an image once for all its beams, before the inputs are repeated."""
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and model_kwargs.get("global_features") is None:
            model_kwargs["global_features"] = self.get_global_features(pixel_values)
            model_kwargs["pixel_values"] = pixel_values[:, -1:]
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, **model_kwargs)

    def _long_rope_begins(self, input_ids: torch.Tensor, cache: Cache | None) -> bool:
        """Phi-3's long RoPE changes all keys when a sequence outgrows the short one: the cache must be made anew."""
        rope = self.config.text_config.rope_parameters
        if cache is None or rope.get("rope_type") != "longrope":
            return False
        limit = self.config.text_config.original_max_position_embeddings
        return input_ids.shape[1] > limit >= cache.get_seq_length()

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        options = vars(generation_config)  # which options there are depends on the release
        for name, reason in REFUSED.items():
            if options.get(name) not in (None, False):
                raise ValueError(f"`{name}` must be None, got {options[name]!r}: {reason}.")
        if generation_config.cache_implementation == PAGED:
            refuse(f"`cache_implementation` must not be {PAGED!r}")
        super()._validate_generation_mode(generation_mode, generation_config, *args, **kwargs)

    def _get_logits_processor(
        self, *args: Any, encoder_input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:  # the prompt's ids, not its embeddings
            encoder_input_ids = in_vocabulary(encoder_input_ids, self.config)
        processors = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        # first, so that no processor counts on them, and last, since one may have raised them again
        mask = PlaceholderLogitsProcessor(self.config)
        return FusionLogitsProcessorList([mask, *processors, mask], self.config)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            return VocabularyPromptLookup(generator, self.config)
        return generator


def find_missing_turns(
    config: FusionConfig, input_ids: torch.Tensor, given: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """
    What a prompt's pass needs to know about the turns in `input_ids` `(B, S)`, with the attention mask `(B, S)`: the
    model may get a mask of another kind, which does not say what is padding.
    """
    names = PromptTurns._fields
    turns = PromptTurns(*(given.get(name) for name in names))
    turns = complete_turns(config, input_ids, given.get("attention_mask"), given.get("pixel_values"), turns)
    return {name: value for name, value in zip(names, turns, strict=True) if value is not None}


def refuse_placeholders(config: FusionConfig, input_ids: torch.Tensor) -> None:
    """
    Check the ids of a prompt that is given as embeddings.

    Raises:
        ValueError: if ids `(B, S)` that come with `inputs_embeds` have an image or latent tokens.
    """
    if PlaceholderMasks.find(input_ids, config).any():
        raise ValueError(
            "`inputs_embeds` must be None for prompts with image or latent tokens, which are found by their ids: pass "
            "`input_ids` alone."
        )


def find_uncached_turns(
    config: FusionConfig, input_ids: torch.Tensor, given: dict[str, Any], model_inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """
    Of a whole conversation `(B, S)` whose beginning is in the cache, so that `model_inputs` has only the rest of its
    ids: what the turns in that rest need.
    """
    global_features, ends = model_inputs.get("global_features"), model_inputs.get("prompt_end_positions")
    if ends is None and global_features is not None and can_find_turns(config):
        ends = find_prompt_ends(input_ids, given.get("attention_mask"), config)
    if ends is not None:
        _check_border(config, input_ids[:, : -model_inputs["input_ids"].shape[1]], ends)
        ends = ends - (input_ids.shape[1] - model_inputs["input_ids"].shape[1])  # (B, R)
        is_behind = ends >= 0
        order = (~is_behind).long().argsort(dim=1, stable=True)  # those that remain come first
        ends = ends.masked_fill(~is_behind, -1).gather(1, order)
    if global_features is None or ends is None or not bool((ends >= 0).any()):
        check_continuation(config, model_inputs["input_ids"])
        return {}
    for row, has_image in enumerate((input_ids == config.image_token_id).any(1).tolist()):
        if not has_image:
            raise ValueError(f"Sample {row} has no image: global_features cannot continue its cache.")
    return {"global_features": global_features, "prompt_end_positions": ends}


def _check_border(config: FusionConfig, cached_ids: torch.Tensor, ends: torch.Tensor) -> None:
    """Check that a cache holds the blocks of the turns that end in it: one may be behind its turn's end."""
    blocks = count_blocks(cached_ids == config.latent_token_id)  # (B)
    turns = ((ends >= 0) & (ends < cached_ids.shape[1])).sum(1)
    for row, (found, expected) in enumerate(zip(blocks.tolist(), turns.tolist(), strict=True)):
        if found != expected:
            raise ValueError(
                f"Sample {row}: the cache holds {found} latent blocks and the ends of {expected} turns, so that it "
                "cannot be continued. Process the whole conversation without it."
            )


def in_vocabulary(input_ids: torch.Tensor, config: FusionConfig) -> torch.Tensor:
    """Return ids that index logits: image and latent placeholders, behind the vocabulary, become a mark inside it."""
    return torch.where(input_ids < config.text_config.vocab_size, input_ids, config.vision_start_token_id)


class PlaceholderLogitsProcessor(LogitsProcessor):
    """Lets no placeholder be written, where logits have a column for it."""

    def __init__(self, config: FusionConfig):
        self.placeholders = (config.image_token_id, config.latent_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # as in fusion-nano, or after `resize_token_embeddings`
        known = [placeholder for placeholder in self.placeholders if placeholder < scores.shape[-1]]
        if not known:
            return scores
        scores = scores.clone()
        scores[:, known] = -torch.inf
        return scores


class FusionLogitsProcessorList(LogitsProcessorList):
    """Shows the processors ids that exist in the logits."""

    def __init__(self, processors: list[LogitsProcessor], config: FusionConfig):
        super().__init__(processors)
        self.config = config

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().__call__(in_vocabulary(input_ids, self.config), scores, **kwargs)


class VocabularyPromptLookup(CandidateGenerator):
    """Prompt lookup that proposes no placeholders: the text before an image may be what the model says last."""

    def __init__(self, lookup: PromptLookupCandidateGenerator, config: FusionConfig):
        self.lookup = lookup
        self.config = config

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        candidates, logits = self.lookup.get_candidates(in_vocabulary(input_ids, self.config), **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        self.lookup.update_candidate_strategy(*args, **kwargs)
