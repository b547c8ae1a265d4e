"""Convert messages and texts to prompts of vLLM with FUSION's processor, since vLLM's own template would lose the
questions.
"""

from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.transformers_utils.processor import cached_processor_from_config
from vllm.utils.async_utils import make_async

from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.vllm.prompt_layout import PromptParser, request_budget

# what `mm_processor_kwargs` of a request may hold
REQUEST_ARGUMENTS = ("query_len", "image_token_grid")
QUESTION = "instruct_input_ids"
TEMPLATE_ARGUMENTS = ("add_generation_prompt", "continue_final_message")
# the key under which a prompt carries its origin to the place where vLLM processes its image
ORIGIN = "_fusion_origin"


class PromptOrigin(NamedTuple):
    """The ids of the question, and the numbers of tokens that the request asks for."""

    question: list[int]
    budget: TokenBudget


class FusionRenderer(HfRenderer):
    """Render chats and texts with [`FusionProcessor`]. Each prompt passes through `_process_tokens`."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._fusion_config = config.model_config.hf_config
        self._fusion_processor = cached_processor_from_config(config.model_config)
        self._parser = PromptParser.of(self._fusion_config, self._fusion_processor)
        self._to_prompt_async = make_async(self._to_prompt, executor=self._executor)
        self._tokenize_prompt_async = make_async(self._tokenize_prompt, executor=self._executor)

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        conversation, mm_data, mm_uuids = parse_chat_messages(
            messages, self.model_config, content_format="openai", media_io_kwargs=params.media_io_kwargs
        )
        return conversation, self._to_prompt(conversation, mm_data, mm_uuids, params)

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        conversation, mm_data, mm_uuids = await parse_chat_messages_async(
            messages, self.model_config, content_format="openai", media_io_kwargs=params.media_io_kwargs
        )
        return conversation, await self._to_prompt_async(conversation, mm_data, mm_uuids, params)

    def _to_prompt(self, conversation: list[Any], mm_data: Any, mm_uuids: Any, params: ChatParams) -> dict[str, Any]:
        """Make a prompt of ids with image tokens in place, and its images."""
        budget = self._budget(params.mm_processor_kwargs)
        given = params.chat_template_kwargs
        options = {name: given[name] for name in TEMPLATE_ARGUMENTS if name in given}
        options.setdefault("add_generation_prompt", not options.get("continue_final_message"))
        text = self._fusion_processor.apply_chat_template(
            [{"role": message["role"], "content": message.get("content") or ""} for message in conversation],
            chat_template=params.chat_template,
            **budget._asdict(),
            tokenize=False,
            **options,
        )
        prompt = self._encode(text, budget)
        if mm_data is not None:
            prompt["multi_modal_data"] = mm_data
        if mm_uuids is not None:
            prompt["multi_modal_uuids"] = mm_uuids
        return prompt

    def _tokenize_prompt(self, prompt: Any, params: TokenizeParams) -> Any:
        """Tokenize a text prompt, as `apply_chat_template(tokenize=False)` writes it."""
        budget = self._budget(prompt.get("mm_processor_kwargs"))
        return {**prompt, **self._encode(prompt["prompt"], budget)}

    def _encode(self, text: str, budget: TokenBudget) -> dict[str, Any]:
        # vLLM processes and caches the image itself
        encoded = self._fusion_processor(text=text, **budget._asdict(), process_images=False)
        question = encoded["instruct_input_ids"][0]
        return {"prompt_token_ids": encoded["input_ids"][0], ORIGIN: PromptOrigin(question, budget)}

    def _budget(self, arguments: Any) -> TokenBudget:
        arguments = dict(arguments or {})
        unknown = sorted(arguments.keys() - {*REQUEST_ARGUMENTS, QUESTION})
        if unknown:
            raise ValueError(
                f"The keys of `mm_processor_kwargs` must be among {', '.join(REQUEST_ARGUMENTS)}, got {unknown[0]!r}."
            )
        return request_budget(self._fusion_config, **{name: arguments.get(name) for name in REQUEST_ARGUMENTS})

    def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        return super()._process_tokens(self._checked(prompt), skip_mm_cache=skip_mm_cache)

    async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        return await super()._process_tokens_async(self._checked(prompt), skip_mm_cache=skip_mm_cache)

    def _checked(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """
        Attach the question to its image, so that it enters the hash of the image. Raise a ValueError if the
        prompt is inconsistent.
        """
        prompt = dict(prompt)
        origin, arguments = prompt.pop(ORIGIN, None), prompt.pop("mm_processor_kwargs", None) or {}
        if origin is None:
            origin = PromptOrigin(arguments.get(QUESTION) or [], self._budget(arguments))
        layout = self._parser.read(prompt["prompt_token_ids"])
        layout.check(origin.budget)
        num_images = len(_as_list((prompt.get("multi_modal_data") or {}).get("image")))
        if num_images != int(layout.num_image_tokens > 0):
            raise ValueError(f"A prompt has {layout.num_image_tokens} image tokens but {num_images} images.")
        if num_images:
            if not origin.question:
                raise ValueError(f"A prompt of ids with an image requires mm_processor_kwargs[{QUESTION!r}].")
            prompt["mm_processor_kwargs"] = {QUESTION: list(origin.question), **origin.budget._asdict()}
        return prompt


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
