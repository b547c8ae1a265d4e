"""Generation with FUSION: inputs of the prompt's pass, continued caches, and options that the samplers rule out.

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

# Inputs that describe the image and the turns of the prompt. Only the pass over the prompt needs them.
PROMPT_INPUTS = (
    "pixel_values",
    "global_features",
    "instruct_input_ids",
    "instruct_attention_mask",
    "prompt_end_positions",
)


PAGED = "paged"  # the cache of continuous batching
# Options of some releases of transformers, and why FUSION does not support them.
REFUSED = {
    "prefill_chunk_size": "FUSION's samplers need each prompt as a whole, with its image and turns, in one pass",
    "assistant_early_exit": "the first layers of FUSION do not form a model of their own",
    "token_healing": "converting a prompt back to text loses the positions of the image and of latent tokens",
    "use_mtp": "FUSION has no layers that predict several tokens",
    "speculation_type": "an assistant that reads FUSION's embeddings does not know image and latent tokens",
}


def refuse(what: str) -> NoReturn:
    """Raise a `ValueError` that begins with `what` and explains that the samplers need whole prompts."""
    raise ValueError(f"{what}. FUSION's samplers need each prompt as a whole, with its image and turns, in one pass.")


class FusionGenerationMixin(GenerationMixin):
    """Extends [`GenerationMixin`] for a model whose prompts must be processed as a whole."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raise an error: continuous batching calls the model on packed ids, without images and turns.

        Raises:
            ValueError: Always. The message names the alternatives.
        """
        alternatives = "Use `generate` with a padded batch, or the vLLM plugin of fusion_hf"
        refuse(f"FUSION does not support continuous batching. {alternatives}")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raise an error, as `init_continuous_batching` does.

        Raises:
            ValueError: Always. The message names the alternatives.
        """
        self.init_continuous_batching()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate token ids, see [`GenerationMixin.generate`].

        Args:
            args, kwargs: Arguments of [`GenerationMixin.generate`] and model inputs, see
                [`FusionForConditionalGeneration.forward`]. You can pass a cache as `cache` or as `past_key_values`.

        Returns:
            [`~utils.ModelOutput`] or `torch.LongTensor` of shape `(B, S)`: As in transformers.

        Raises:
            ValueError: If an option is incompatible with the samplers, or if
                [`FusionForConditionalGeneration.forward`] refuses the inputs.
        """
        if kwargs.get("cache_implementation") == PAGED:  # transformers checks other arguments first
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
        """
        Prepare the inputs of one pass. Only passes over the whole prompt receive the image and the turns.

        Args:
            input_ids (`(B, S)`): Ids of prompts and answers so far.
            next_sequence_length (`int`, *optional*): Number of ids that the pass reads. Defaults to all.
            past_key_values, cache ([`Cache`], *optional*): The cache, under one of its two names.
            inputs_embeds (`(B, S, D)`, *optional*): Embeddings instead of ids, for the first pass.
            is_first_iteration (`bool`): Whether this is the first pass of a `generate` call.
            kwargs: Further inputs of the model.

        Returns:
            `dict`: Arguments of the model's `forward`.
        """
        cache = either_cache(cache, past_key_values)
        if is_first_iteration and input_ids.device.type == "cpu":
            give_room(cache)
        uses_flash = "flash" in self.config.text_config._attn_implementation
        if uses_flash and isinstance(cache, StaticCache) and kwargs.get("attention_mask") is None:
            # `generate` drops masks without padding, but here they tell which cache positions are filled
            length = int(cache.get_seq_length()) + (next_sequence_length or input_ids.shape[1])
            kwargs["attention_mask"] = torch.ones(len(input_ids), length, dtype=torch.long, device=input_ids.device)
        continues = next_sequence_length is not None and next_sequence_length < input_ids.shape[1]
        if continues and self._long_rope_begins(input_ids, cache):
            cache = next_sequence_length = None
        # `is_first_iteration` is False in the first pass of an assistant model, so look at the length as well
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
        """Encode the tiles of an image once for all beams, before the inputs are repeated."""
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and model_kwargs.get("global_features") is None:
            model_kwargs["global_features"] = self.get_global_features(pixel_values)
            model_kwargs["pixel_values"] = pixel_values[:, -1:]
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, **model_kwargs)

    def _long_rope_begins(self, input_ids: torch.Tensor, cache: Cache | None) -> bool:
        """Return whether the sequence outgrows Phi-3's short RoPE: all keys change, so the cache must be rebuilt."""
        rope = self.config.text_config.rope_parameters
        if cache is None or rope.get("rope_type") != "longrope":
            return False
        limit = self.config.text_config.original_max_position_embeddings
        return input_ids.shape[1] > limit >= cache.get_seq_length()

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        options = vars(generation_config)  # the available options depend on the release
        for name, reason in REFUSED.items():
            if options.get(name) not in (None, False):
                raise ValueError(f"`{name}` must be None, got {options[name]!r}, because {reason}.")
        if generation_config.cache_implementation == PAGED:
            refuse(f"`cache_implementation` must not be {PAGED!r}")
        super()._validate_generation_mode(generation_mode, generation_config, *args, **kwargs)

    def _get_logits_processor(
        self, *args: Any, encoder_input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:  # ids of the prompt, not embeddings
            encoder_input_ids = in_vocabulary(encoder_input_ids, self.config)
        processors = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        # first, so that no processor considers placeholders, and last, because a processor may raise their scores
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
    Find the information about turns that the pass over a prompt needs and the caller did not give.

    The attention mask is read here because the model may get a mask of another kind, which does not show padding.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`): Ids of the prompts.
        given (`dict`): Model inputs that the caller passed, such as `attention_mask` `(B, S)` and `pixel_values`.

    Returns:
        `dict[str, torch.Tensor]`: The fields of [`PromptTurns`] that are known now.
    """
    names = PromptTurns._fields
    turns = PromptTurns(*(given.get(name) for name in names))
    turns = complete_turns(config, input_ids, given.get("attention_mask"), given.get("pixel_values"), turns)
    return {name: value for name, value in zip(names, turns, strict=True) if value is not None}


def refuse_placeholders(config: FusionConfig, input_ids: torch.Tensor) -> None:
    """
    Check the ids of a prompt that is passed as embeddings.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`): Ids that were passed together with `inputs_embeds`.

    Raises:
        ValueError: If the ids contain image or latent tokens.
    """
    if PlaceholderMasks.find(input_ids, config).any():
        raise ValueError(
            "`inputs_embeds` must be None for prompts with image or latent tokens, which the model finds by their "
            "ids. Pass only `input_ids`."
        )


def find_uncached_turns(
    config: FusionConfig, input_ids: torch.Tensor, given: dict[str, Any], model_inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """
    Find the turns in the uncached part of a conversation whose beginning is in the cache.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`): Ids of the whole conversation.
        given (`dict`): Model inputs that the caller passed.
        model_inputs (`dict`): Inputs of this pass, whose `input_ids` are the uncached part.

    Returns:
        `dict[str, torch.Tensor]`: `global_features` and `prompt_end_positions` of the uncached turns, or an empty dict
        if there are none.

    Raises:
        ValueError: If the uncached part cannot continue the cache.
    """
    global_features, ends = model_inputs.get("global_features"), model_inputs.get("prompt_end_positions")
    if ends is None and global_features is not None and can_find_turns(config):
        ends = find_prompt_ends(input_ids, given.get("attention_mask"), config)
    if ends is not None:
        _check_border(config, input_ids[:, : -model_inputs["input_ids"].shape[1]], ends)
        ends = ends - (input_ids.shape[1] - model_inputs["input_ids"].shape[1])  # (B, R)
        is_behind = ends >= 0
        order = (~is_behind).long().argsort(dim=1, stable=True)  # the remaining ends come first
        ends = ends.masked_fill(~is_behind, -1).gather(1, order)
    if global_features is None or ends is None or not bool((ends >= 0).any()):
        check_continuation(config, model_inputs["input_ids"])
        return {}
    for row, has_image in enumerate((input_ids == config.image_token_id).any(1).tolist()):
        if not has_image:
            raise ValueError(f"Sample {row} has no image, so `global_features` cannot continue its cache.")
    return {"global_features": global_features, "prompt_end_positions": ends}


def _check_border(config: FusionConfig, cached_ids: torch.Tensor, ends: torch.Tensor) -> None:
    """Check that a cache holds the blocks of all turns that end in it, since a block may follow its turn's end."""
    blocks = count_blocks(cached_ids == config.latent_token_id)  # (B)
    turns = ((ends >= 0) & (ends < cached_ids.shape[1])).sum(1)
    for row, (found, expected) in enumerate(zip(blocks.tolist(), turns.tolist(), strict=True)):
        if found != expected:
            raise ValueError(
                f"Sample {row}: the cache holds {found} latent blocks but the ends of {expected} turns, so it cannot "
                "be continued. Pass the whole conversation without the cache."
            )


def in_vocabulary(input_ids: torch.Tensor, config: FusionConfig) -> torch.Tensor:
    """
    Replace placeholders, which lie outside the vocabulary, by `<vision_start>`, so that ids can index logits.

    Args:
        input_ids (`(B, S)`): Ids of prompts and answers.
        config ([`FusionConfig`]): Configuration of the model.

    Returns:
        `(B, S)`: The ids.
    """
    return torch.where(input_ids < config.text_config.vocab_size, input_ids, config.vision_start_token_id)


class PlaceholderLogitsProcessor(LogitsProcessor):
    """A [`LogitsProcessor`] that prevents the model from generating image and latent placeholders."""

    def __init__(self, config: FusionConfig):
        self.placeholders = (config.image_token_id, config.latent_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # the vocabulary has the placeholders in fusion-nano and after `resize_token_embeddings`
        known = [placeholder for placeholder in self.placeholders if placeholder < scores.shape[-1]]
        if not known:
            return scores
        scores = scores.clone()
        scores[:, known] = -torch.inf
        return scores


class FusionLogitsProcessorList(LogitsProcessorList):
    """A list of logits processors that see only ids that exist in the logits."""

    def __init__(self, processors: list[LogitsProcessor], config: FusionConfig):
        super().__init__(processors)
        self.config = config

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().__call__(in_vocabulary(input_ids, self.config), scores, **kwargs)


class VocabularyPromptLookup(CandidateGenerator):
    """Prompt lookup that proposes no placeholders, for answers that repeat the text before an image."""

    def __init__(self, lookup: PromptLookupCandidateGenerator, config: FusionConfig):
        self.lookup = lookup
        self.config = config

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        candidates, logits = self.lookup.get_candidates(in_vocabulary(input_ids, self.config), **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        self.lookup.update_candidate_strategy(*args, **kwargs)
