"""The model adapter for lmms-eval: `lmms-eval --model fusion --model_args pretrained=DIR`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.answer_cache import Answer, AnswerCache
from fusion_hf.evaluation.answering import Failure, Model, RequestAnswerer
from fusion_hf.evaluation.local import BATCH_SIZE, LocalModel
from fusion_hf.evaluation.processes import Processes
from fusion_hf.evaluation.prompting import Continuation, Generation, Messages, Request
from fusion_hf.evaluation.served import PARALLEL, ServedModel
from fusion_hf.inference.devices import AUTO, choose_device

SHOWN_FAILURES = 3


class RequestsFailed(RuntimeError):
    """
    Some requests of a task have no answer, so the task is not scored.

    Args:
        failures: the failed requests.
    """

    def __init__(self, failures: Sequence[Failure]):
        shown = "; ".join(str(failure) for failure in failures[:SHOWN_FAILURES])
        more = f"; and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
        super().__init__(f"{len(failures)} requests failed: {shown}{more}")
        self.failures = list(failures)


class FusionChat(lmms):
    """
    Let lmms-eval ask a FUSION model with chat messages.

    Args:
        pretrained: a model folder or a repository of the Hub. None uses the bundled fusion-nano. With `url`, the name
            of the model on the server, or None for its only one.
        device: the device of the model, see `ChatModel.load`. Give it either here or to lmms-eval.
        dtype: the dtype of the model, see `ChatModel.load`.
        batch_size: the number of prompts that are answered together.
        query_len: the number of latent tokens, see `ChatModel.answer`.
        image_token_grid: the side of the grid of image tokens, see `ChatModel.answer`.
        answers: a folder to store answers in. A run that was killed continues with them.
        max_batch_size: ignored. lmms-eval may pass it.
        url: the address of a server to ask instead of a model in this process. `device`, `dtype` and `batch_size` then
            have no effect.
        api_key_env: the environment variable with the API key of the server.
        parallel: the number of concurrent requests to the server.

    Raises:
        InputError: if the model or server does not exist, or an argument is invalid.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        device: str = AUTO,
        dtype: str = AUTO,
        batch_size: int | str = BATCH_SIZE,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        answers: str | None = None,
        max_batch_size: int | None = None,
        url: str | None = None,
        api_key_env: str | None = None,
        parallel: int = PARALLEL,
    ):
        rank = int(os.environ.get("RANK", 0))
        budget = {"query_len": query_len, "image_token_grid": image_token_grid}
        model: Model
        if url is None:
            model = LocalModel.load(pretrained, own_device(device), dtype, batch_size=int(batch_size), **budget)
        elif (device, dtype) != (AUTO, AUTO):
            raise InputError(
                f"`device` and `dtype` must be {AUTO} if `url` is given, since the server chooses them, got {device} "
                f"and {dtype}."
            )
        else:
            model = ServedModel.connect(url, pretrained, api_key_env, parallel=parallel, **budget)
        cache = None if answers is None else AnswerCache(Path(answers), rank)
        answerer = RequestAnswerer(model, cache, progress=rank == 0)
        self._begin(answerer, Accelerator(cpu=model.device.type == "cpu"))

    @classmethod
    def around(cls, answerer: RequestAnswerer) -> "FusionChat":
        """
        Make an adapter around an existing answerer.

        Args:
            answerer: the answerer.
        """
        adapter = cls.__new__(cls)
        adapter._begin(answerer, None)
        return adapter

    def _begin(self, answerer: RequestAnswerer, accelerator: Accelerator | None) -> None:
        super().__init__()
        # no attribute may be a module, since lmms-eval's `clean` deletes modules after the first task
        self.answerer = answerer
        self.accelerator = accelerator
        if accelerator is not None:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.answerer.model.device

    @property
    def batch_size(self) -> int:
        return self.answerer.model.batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answer requests in text.

        Args:
            requests: the requests of lmms-eval.

        Returns:
            The answers in the order of the requests.

        Raises:
            RequestsFailed: in all processes, if a request has no answer.
        """
        return [answer["answer"] for answer in self._answer(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Compute the losses of continuations, which are their negated log-probabilities, and whether each is the
        greedy one.

        lmms-eval 0.7.3 takes the smallest value as the choice of the model, in spite of the method's name.

        Args:
            requests: the requests of lmms-eval.

        Returns:
            The results in the order of the requests.

        Raises:
            RequestsFailed: in all processes, if a request has no answer.
        """
        # lmms-eval's evaluator unpacks the pair, but converts a bare pair to text
        return [GenerationResult((-answer["logprob"], answer["greedy"])) for answer in self._answer(requests)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise InputError("The output type of a task must be generate_until, got generate_until_multi_round.")

    def translate(self, requests: Sequence[Instance]) -> list[Request]:
        """
        Convert requests of lmms-eval to those of this package.

        Args:
            requests: the requests of lmms-eval.
        """
        return [self._translate(request) for request in requests]

    def _answer(self, requests: Sequence[Instance]) -> list[Answer]:
        first = len(self.answerer.failures)
        answers = self.answerer.answer(self.translate(requests))
        # all processes fail together, since one that continued alone would wait for the others forever
        gathered = Processes(self.rank, self.world_size).gather(self.answerer.failures[first:])
        failures = [failure for part in gathered for failure in part]
        if failures:
            raise RequestsFailed(failures)
        return [answer for answer in answers if answer is not None]

    def _translate(self, request: Instance) -> Request:
        *_, doc_id, task, split = request.args

        def doc() -> dict[str, Any]:
            return self.task_dict[task][split][doc_id]

        def read() -> Messages:
            if _is_chat(request):
                return request.args[1](doc())
            return _with_visuals(request.args[0], request.args[2], doc())

        if request.request_type != "loglikelihood":
            return Request(task, doc_id, read, Generation.of(request.args[2 if _is_chat(request) else 1]))
        continuation = request.args[1]
        text = continuation if isinstance(continuation, str) else continuation(doc())
        return Request(task, doc_id, read, Continuation(text))


class FusionSimple(FusionChat):
    """The same adapter for `lmms-eval --force_simple`, which tasks that score options require."""

    is_simple = True


def _is_chat(request: Instance) -> bool:
    """
    Return whether a request has messages. lmms-eval also passes simple requests of tasks in a folder to chat
    models.
    """
    return request.request_type != "loglikelihood" and callable(request.args[1])


def own_device(name: str) -> str:
    """
    Choose the device of this process. Several processes on a machine use one GPU each.

    Args:
        name: the name of the device, or `auto`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and choose_device(name) == torch.device("cuda"):
        return f"cuda:{local_rank}"
    return name


def _with_visuals(context: str, doc_to_visual: Any, doc: dict[str, Any]) -> Messages:
    visuals = [] if doc_to_visual is None else doc_to_visual(doc) or []
    for visual in visuals:
        if not isinstance(visual, (Image.Image, str)):
            raise InputError(f"The visuals of a request must be images, got {type(visual).__name__}.")
    content = [*({"type": "image", "url": visual} for visual in visuals), {"type": "text", "text": context}]
    return [{"role": "user", "content": content}]
