"""The loop of `generate` for compiled steps. A GPU begins the next step before the last one has been read.

Shapes: B batch, S ids so far.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration


class Reports:
    """
    Results of steps, copied to the CPU.

    Reading a result waits for the device, and the device then waits for the next step. The reader therefore stays
    `delay` steps behind.
    """

    def __init__(self, delay: int):
        self.delay = delay
        self._sent: deque[tuple[torch.Tensor, torch.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, report: torch.Tensor) -> None:
        """Copy a report to the CPU without waiting for it."""
        event = None
        copied = report.to("cpu", non_blocking=True)
        if report.device.type != "cpu":
            event = torch.Event(device=report.device)
            event.record()
        self._sent.append((copied, event))

    def receive(self, all_of_them: bool = False) -> Iterator[torch.Tensor]:
        """Yield the reports that are due."""
        while len(self._sent) > (0 if all_of_them else self.delay):
            report, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            yield report


def delay_of(device: torch.device) -> int:
    """Return 1 on a GPU, whose steps run asynchronously, and 0 on a CPU, which would waste a step per answer."""
    return 1 if device.type == "cuda" else 0


def decode_ahead(
    model: FusionForConditionalGeneration,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """
    Decode as `generate` does, greedily or by sampling, with an empty static cache. Use it as `custom_generate`.

    The loop of transformers checks after each step whether all rows have ended, and only then begins the next step.

    Args:
        model: The model.
        input_ids: Prompts `(B, S)`.
        logits_processor, stopping_criteria, generation_config: Arguments that `generate` passes.
        streamer: Streamer that receives the new tokens. `generate` has passed the prompt to it.
        model_kwargs: Arguments that `generate` has prepared for the model.

    Returns:
        Prompts and answers `(B, S + n)`.
    """
    reports = Reports(delay_of(input_ids.device))
    step: Callable[..., Any] = model
    if model._valid_auto_compile_criteria(model_kwargs, generation_config):  # some quantized weights do not compile
        step = model.get_compiled_call(generation_config.compile_config)
    put = (lambda tokens: None) if streamer is None else streamer.put
    pad = _padding(generation_config, stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    prompt = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    outputs = model(**prompt, return_dict=True)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        # a copy, because the next step of a CUDA graph overwrites the logits of this one
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)  # (B, vocabulary)
        del outputs
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)  # (B,)
        else:
            tokens = scores.argmax(-1)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        reports.send(torch.cat([unfinished.any().long()[None], tokens]))
        is_over = False
        for report in reports.receive(all_of_them=input_ids.shape[1] >= stopping_criteria.max_length):
            put(report[1:])
            is_over = not bool(report[0])
            if is_over:
                break
        if is_over or input_ids.shape[1] >= stopping_criteria.max_length:
            break
        following = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        outputs = step(**following, return_dict=True)
    if streamer is not None:
        streamer.end()
    return input_ids[:, : input_ids.shape[1] - len(reports)]  # without steps after the end


def _padding(generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList) -> int | None:
    """Return the id that follows a row's end, as in transformers. None means that rows do not end on their own."""
    if not any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria):
        return None
    if generation_config.pad_token_id is not None:
        return generation_config.pad_token_id
    end = generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end


__all__ = ["decode_ahead"]
