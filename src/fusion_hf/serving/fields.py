"""Tables of the fields that a request may have: known ones, unsupported ones with their neutral values, and ignored
ones.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_hf.serving.api_errors import wrong_value

UNSUPPORTED, UNKNOWN = "unsupported_value", "unknown_parameter"
ANY_FLAG = (True, False)


@dataclass(frozen=True)
class Fields:
    """
    The fields of a JSON object. Fields that are null count as absent.

    Args:
        known: the fields that are read.
        neutral: unsupported fields, with the values that request nothing.
        ignored: fields that never change an answer.
    """

    known: tuple[str, ...]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def select(self, content: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """
        Check all fields of an object, and return the known ones.

        Args:
            content: the object.
            where: the path of the object in the request, or "" for the request itself.

        Returns:
            The known fields that are not null.

        Raises:
            ApiError: if a field is unknown, or the value of an unsupported field requests something.
        """
        given = {name: value for name, value in content.items() if value is not None}
        # in the order of the table, so that a client with tools gets the error about tools, not about choosing one
        for name in self.neutral:
            if name in given and not any(_is_same(given[name], x) for x in self.neutral[name]):
                allowed = " or ".join(map(json.dumps, self.neutral[name]))
                raise wrong_value(_join(where, name), given[name], allowed, UNSUPPORTED)
        for name, value in given.items():
            if name not in self.known and name not in self.neutral and name not in self.ignored:
                allowed = f"left out, since it is not one of the known fields {', '.join(self.known)}"
                raise wrong_value(_join(where, name), value, allowed, UNKNOWN)
        return {name: value for name, value in given.items() if name in self.known}


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _is_same(value: Any, allowed: Any) -> bool:
    """Compare two values of JSON, where `true` is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


# values of these fields in a request without tools
WITHOUT_TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": ANY_FLAG,
    "functions": ([],),
    "function_call": ("none", "auto"),
}
REQUEST = Fields(
    known=(
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream",
        "stream_options", "query_len", "image_token_grid",
    ),
    neutral={
        **WITHOUT_TOOLS,
        # further fields of OpenAI's protocol
        "n": (1,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        # fields of the older completions
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        # fields of other servers (vLLM, SGLang, llama.cpp, OpenRouter, TGI) for sampling and stopping
        "repetition_penalty": (1,),
        "repeat_penalty": (1,),
        "length_penalty": (1,),
        "no_repeat_ngram_size": (0,),
        "top_k": (-1, 0),
        "min_p": (0,),
        "top_a": (0,),
        "typical_p": (1,),
        "do_sample": (False,),
        "num_beams": (1,),
        "use_beam_search": (False,),
        "early_stopping": (False,),
        "min_tokens": (0,),
        "ignore_eos": (False,),
        "stop_token_ids": ([],),
        "bad_words": ([],),
        "logits_processors": ([],),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        # fields of other servers for the format of prompts and answers
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
        "documents": ([],),
        "enable_thinking": (False,),
        "thinking": ({"type": "disabled"},),
        "include_reasoning": ANY_FLAG,  # FUSION writes no reasoning
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "priority": (0,),
    },
    ignored=("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "cache_control"),
)  # fmt: skip
STREAM_OPTIONS = Fields(
    known=("include_usage",),
    neutral={"include_obfuscation": (False,), "continuous_usage_stats": (False,)},
)
# Answers that clients send back have empty fields of features that were not used.
MESSAGE = Fields(
    known=("role", "content"),
    neutral={
        "tool_calls": ([],),
        "refusal": ("",),
        "annotations": ([],),
        "images": ([],),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "reasoning_details": ([],),
        "thinking_blocks": ([],),
        "provider_specific_fields": ({}, {"refusal": None}),
    },
    ignored=("name", "cache_control"),
)
TEXT_PART = Fields(known=("type", "text"), neutral={"annotations": ([],)}, ignored=("cache_control",))
IMAGE_PART = Fields(known=("type", "image_url"), ignored=("cache_control",))
# this model has `query_len` and `image_token_grid` instead of `detail`
IMAGE_URL = Fields(known=("url",), neutral={"detail": ("auto", "low", "high")})
