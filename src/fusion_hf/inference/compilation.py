"""Generation with compiled code. All inputs have one of a few shapes, so that no shape is compiled twice.

Shapes: B batch, S prompt length, T question tokens, R user turns, n new tokens.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, StaticCache

from fusion_hf.inference.decoding import decode_ahead
from fusion_hf.model.compatibility_fusion import CACHE_NAMES
from fusion_hf.model.configuration_fusion import FusionConfig, TokenBudget, require
from fusion_hf.model.generation_fusion import find_missing_turns
from fusion_hf.model.input_checks_fusion import check_prompt
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_base import cache_keyword
from fusion_hf.model.turns_fusion import PromptTurns

PROMPT_LENGTHS = (1024, 2048, 4096)
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SHORTEST_QUESTION = 32  # shorter questions are padded to this length if the prompt is compiled
# These options change the batch of the cache, need a cache that can shrink, or use their own.
REFUSED = ("num_beams", "num_return_sequences", "assistant_model", "prompt_lookup_num_tokens", *CACHE_NAMES)
SHAPES_AT_MOST = 64  # torch's own limit, after which it stops compiling, is 8


class CompiledGenerator:
    """
    Generates with compiled decoding steps and, if you ask for it, a compiled pass over the prompt.

    Compiled code is specific to the shapes for which it was made. Therefore one static cache per prompt length is kept
    from call to call, and smaller batches are filled with copies of their last row. If the prompt is compiled as well,
    it is padded to its prompt length, and its question and its number of turns are padded to powers of two. The first
    call with each shape compiles, which takes minutes for a large model.

    Args:
        model: The model, which is not changed.
        prompt_lengths: Lengths to which prompts are assigned: the smallest one that is long enough.
        max_new_tokens: Maximum number of new tokens of a call.
        batch_size: Number of rows of every call.
        compile_prompt: Whether to compile the pass over the prompt as well, with tower and samplers in one graph.
        mode: Mode of `torch.compile`. `"reduce-overhead"` uses CUDA graphs on a GPU.
        options: Options of `torch.compile`, only with the mode `"default"`. `{"cpp_wrapper": True}` is fastest on a
            CPU.
        backend: Backend of `torch.compile`.

    Raises:
        ValueError: If an argument does not allow compilation. The message names its value and the allowed values.
    """

    def __init__(
        self,
        model: FusionForConditionalGeneration,
        prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
        max_new_tokens: int = 256,
        batch_size: int = 1,
        compile_prompt: bool = False,
        mode: str = "default",
        options: dict[str, Any] | None = None,
        backend: Any = "inductor",
    ):
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            require(value >= 1, name, value, "at least 1")
        is_positive = len(prompt_lengths) > 0 and min(prompt_lengths) > 0
        require(is_positive, "prompt_lengths", prompt_lengths, "a list of positive lengths")
        longest = model.config.text_config.max_position_embeddings - max_new_tokens
        require(max(prompt_lengths) <= longest, "prompt_lengths", prompt_lengths, f"at most {longest} for this model")
        require(mode in MODES, "mode", mode, f"one of {', '.join(map(repr, MODES))}")
        require(not options or mode == "default", "mode", mode, "'default' if you pass `options`")
        early = model.config.early_text_attention
        allowed = "False if `early_text_attention` is 'uniform_padded', because padding the question changes answers"
        require(not (compile_prompt and early == "uniform_padded"), "compile_prompt", compile_prompt, allowed)
        parts = ("text_config", "vision_config") if compile_prompt else ("text_config",)
        for name in (getattr(model.config, part)._attn_implementation for part in parts):
            # flash attention removes padding, so that shapes depend on values
            allowed = "one of 'eager', 'sdpa', 'flex_attention' in compiled parts"
            require("flash" not in name, "attn_implementation", name, allowed)
        self.prompt_lengths = sorted(prompt_lengths)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.compile_prompt = compile_prompt
        # the copy shares all weights, and compilation changes only the copy
        self._model = copy.copy(model)
        self._caches: dict[int, StaticCache] = {}
        # older releases of transformers branch on the length there, which breaks the graph in two
        whole = model.config.text_config.rope_parameters.get("rope_type") != "longrope"
        settings: dict[str, Any] = {"fullgraph": whole, "dynamic": False, "backend": backend, "mode": mode}
        if options:  # torch accepts either a mode or options
            settings.update(mode=None, options=options)
        if compile_prompt:
            self._model.compile(**settings)
            self._options: dict[str, Any] = {"disable_compile": True}  # its steps are compiled already
        else:
            compile_config = CompileConfig(**settings)
            compile_config._compile_all_devices = True  # on a CPU as well
            self._options = {"compile_config": compile_config}

    @torch.inference_mode()
    def generate(self, max_new_tokens: int | None = None, **inputs: Any) -> torch.Tensor:
        """
        Generate token ids, with the same result as the model's `generate` for the same arguments.

        Args:
            max_new_tokens: Maximum number of new tokens, n. Defaults to that of this generator.
            inputs: Outputs of the processor for at most `batch_size` conversations, padded on the left; `query_len`,
                `global_features`; and options of `generate` that change neither the batch nor the cache.

        Returns:
            Prompts and answers `(B, S + n)`.

        Raises:
            ValueError: If a prompt or a batch fits no shape, if an option is not supported, or if inputs disagree (see
                [`FusionForConditionalGeneration.forward`]).
        """
        new_tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        allowed = f"from 1 to {self.max_new_tokens}"
        require(1 <= new_tokens <= self.max_new_tokens, "max_new_tokens", new_tokens, allowed)
        for name in REFUSED:
            require(inputs.get(name) in (None, 1), name, inputs.get(name), "None in compiled generation")
        input_ids = inputs["input_ids"]  # (B, S)
        batch, length = input_ids.shape
        allowed = f"at most {self.batch_size} (the `batch_size` of this generator)"
        require(batch <= self.batch_size, "batch", batch, allowed)
        padded = next((known for known in self.prompt_lengths if known >= length), None)
        if padded is None:
            longest = self.prompt_lengths[-1]
            raise ValueError(f"A prompt must have at most {longest} tokens (`prompt_lengths`), got {length}.")
        inputs = self._check(inputs)
        if self.compile_prompt:
            inputs = _pad(inputs, padded, self._model.config)
        inputs = _fill_up(inputs, self.batch_size)
        with torch._dynamo.config.patch(recompile_limit=SHAPES_AT_MOST):
            output = self._model.generate(
                **inputs,
                **self._options,
                **cache_keyword(self._cache(padded)),
                max_new_tokens=new_tokens,
                # transformers does not pass the streamer to custom functions
                custom_generate=partial(decode_ahead, streamer=inputs.get("streamer")),
            )
        return torch.cat([input_ids, output[:batch, inputs["input_ids"].shape[1] :]], dim=1)

    def _check(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Check and complete inputs, as the model does only if it is not compiled."""
        config, ids, mask = self._model.config, inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("`attention_mask` must have its padding on the left, got padding on the right.")
        # then nothing is missing, so compiled code does not search for it
        nothing = dict.fromkeys(PromptTurns._fields, ids[:, :0])
        inputs = inputs | nothing | find_missing_turns(config, ids, inputs)
        budget = TokenBudget.of(config, inputs.get("query_len"), inputs.get("image_token_grid"))
        check_prompt(config, ids, mask, inputs.get("pixel_values"), inputs["prompt_end_positions"], budget)
        return inputs

    def _cache(self, prompt_length: int) -> StaticCache:
        """Return the empty cache for a prompt length."""
        cache = self._caches.get(prompt_length)
        if cache is not None:
            cache.reset()
            return cache
        text_config = self._model.config.text_config
        cache = StaticCache(text_config, max_cache_len=prompt_length + self.max_new_tokens)
        if self.compile_prompt:  # otherwise the pass over the prompt allocates the tensors
            heads = text_config.num_attention_heads
            cache.early_initialization(
                batch_size=self.batch_size,
                num_heads=text_config.num_key_value_heads,
                head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
                dtype=self._model.dtype,
                device=self._model.device,
            )
        self._caches[prompt_length] = cache
        return cache


def _pad(inputs: dict[str, Any], length: int, config: FusionConfig) -> dict[str, Any]:
    """Pad prompts left to `length`, and questions right and turns by -1 to powers of two. Values do not change."""
    missing = length - inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    pad_token_id = config.text_config.pad_token_id or 0  # any id, because it is masked
    padded = inputs | {
        "input_ids": nn.functional.pad(inputs["input_ids"], (missing, 0), value=pad_token_id),
        "attention_mask": nn.functional.pad(mask, (missing, 0)),
    }
    ends = inputs.get("prompt_end_positions")  # (B, R)
    if ends is not None and ends.numel() > 0:
        ends = torch.where(ends < 0, ends, ends + missing)
        more = _power_of_two(ends.shape[1]) - ends.shape[1]
        padded["prompt_end_positions"] = nn.functional.pad(ends, (0, more), value=-1)
    question = inputs.get("instruct_input_ids")  # (B, T)
    if question is not None:
        more = max(SHORTEST_QUESTION, _power_of_two(question.shape[1])) - question.shape[1]
        question_mask = inputs.get("instruct_attention_mask")
        question_mask = torch.ones_like(question) if question_mask is None else question_mask
        padded["instruct_input_ids"] = nn.functional.pad(question, (0, more), value=config.instruct_pad_token_id)
        padded["instruct_attention_mask"] = nn.functional.pad(question_mask, (0, more))
    return padded


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _fill_up(inputs: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Repeat the last row of every tensor up to `batch_size` rows."""
    return {
        name: torch.cat([value, value[-1:].expand(batch_size - len(value), *value.shape[1:])])
        if isinstance(value, torch.Tensor) and value.ndim > 0
        else value
        for name, value in inputs.items()
    }


__all__ = ["CompiledGenerator"]
