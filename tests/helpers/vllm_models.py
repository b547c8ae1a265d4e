"""Small models as folders that vLLM loads, prompts for them, and what transformers says to the same prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tests.helpers.tiny import tiny_config, tiny_model
from tests.helpers.tokenizers import write_phi3_tokenizer

from fusion_hf import FusionConfig, FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.conversion.marked_tokenizer import add_marks, load_tokenizer
from fusion_hf.conversion.model_folder import make_processor

MAX_LENGTH = 512
PHI3_ROWS = 32_013
# the smallest attention heads that vLLM's CPU kernels know have 32 columns
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LENGTH,
}
QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a red circle?", "yes, a big one")


@dataclass
class Case:
    """One conversation and what its request asks for."""

    questions: list[str]
    color: str | None = "red"  # of the image; None: there is none
    answers: list[str] = field(default_factory=list)
    system: str | None = None
    budget: dict[str, int] = field(default_factory=dict)
    max_tokens: int = 6

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn, question in enumerate(self.questions):
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if turn == 0 and self.color is not None:
                content.insert(0, {"type": "image", "image": draw_image(self.color)})
            messages.append({"role": "user", "content": content})
            if turn < len(self.answers):
                messages.append({"role": "assistant", "content": self.answers[turn]})
        return messages


CASES = [
    Case([QUESTIONS[0]]),
    Case([QUESTIONS[1]]),  # another question about the same image
    Case([QUESTIONS[0]], color="blue"),
    Case([QUESTIONS[0]], color=None),
    Case([QUESTIONS[3]], color=None, system="you answer with one word"),
    Case([QUESTIONS[0], QUESTIONS[1]], color=None, answers=["red"]),
    Case(list(QUESTIONS[:3]), answers=["red", "circle"], max_tokens=12),
    Case([QUESTIONS[1], QUESTIONS[0]], color="green", answers=["no"], system="look closely"),
    Case([" ".join(QUESTIONS * 3)], max_tokens=12),
    Case(["?"], color="yellow"),
    Case([QUESTIONS[0]], budget={"query_len": 1}),
    Case([QUESTIONS[0], QUESTIONS[2]], answers=["red"], budget={"query_len": 16}),
    Case([QUESTIONS[0]], budget={"image_token_grid": 3}),
    Case([QUESTIONS[2], QUESTIONS[0]], answers=["yes"], budget={"image_token_grid": 2, "query_len": 1}),
    Case([QUESTIONS[2]], color=None, budget={"query_len": 16}),
    Case(["say <image> or <|im_end|>, <|end|> and <latent_image><latent_image>"], max_tokens=8),
]


def draw_image(color: str) -> Image.Image:
    image = Image.new("RGB", (64, 48), "white")
    ImageDraw.Draw(image).ellipse((12, 8, 44, 40), fill=color)
    return image


def write_random_model(folder: Path, backbone: str, text: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A model with random weights and a real tokenizer: Phi-3's for phi3, else `fusion-nano`'s."""
    if backbone == "phi3":
        tokenizer = load_tokenizer(write_phi3_tokenizer(folder / "source"), "phi3", MAX_LENGTH)
        add_marks(tokenizer, PHI3_ROWS)  # image and latent placeholders lie behind the vocabulary
        sizes = {"vocab_size": PHI3_ROWS, "eos_token_id": 32_007}
    else:
        tokenizer = FusionProcessor.from_pretrained(nano_path()).tokenizer
        tokenizer.model_max_length = MAX_LENGTH
        sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        names = ("image_token_id", "latent_token_id", "vision_start_token_id", "vision_end_token_id")
        marks = ["<image>", "<latent_image>", "<vision_start>", "<vision_end>"]
        changes |= dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True))
    head = {"head_dim": 32} if backbone == "qwen3" else {}
    config = tiny_config(backbone, text={**SIZES, **sizes, **head, **(text or {})}, query_lens=[1, 4, 16], **changes)
    save_model(folder, tiny_model(config, scale=2.0), make_processor(config, tokenizer))
    return folder


def save_model(folder: Path, model: FusionForConditionalGeneration, processor: FusionProcessor) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@dataclass(frozen=True)
class Answer:
    """Greedy ids and their log-probabilities."""

    ids: list[int]
    logprobs: list[float]

    def difference(self, other: "Answer") -> float:
        """The largest difference of log-probabilities, infinite where the ids differ."""
        if self.ids != other.ids:
            return float("inf")
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


class Reference:
    """The model in transformers, one prompt at a time, in float32."""

    def __init__(self, folder: Path | str):
        self.model = FusionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = FusionProcessor.from_pretrained(folder)

    @property
    def config(self) -> FusionConfig:
        return self.model.config

    @torch.inference_mode()
    def answer(self, case: Case) -> Answer:
        inputs = self.processor.apply_chat_template(
            case.messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            **case.budget,
        )
        output = self.model.generate(
            **inputs,
            **case.budget,
            max_new_tokens=case.max_tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        scores = [score[0].float().log_softmax(-1)[i].item() for score, i in zip(output.scores, ids, strict=True)]
        return Answer(ids, scores)

    def prompt(self, case: Case) -> dict[str, Any]:
        """The case as a text prompt of vLLM."""
        options = {"query_len": case.budget["query_len"]} if "query_len" in case.budget else {}
        text = self.processor.apply_chat_template(case.messages, add_generation_prompt=True, **options)
        prompt: dict[str, Any] = {"prompt": text, "mm_processor_kwargs": dict(case.budget)}
        if case.color is not None:
            prompt["multi_modal_data"] = {"image": draw_image(case.color)}
        return prompt


def answer_of(output: Any) -> Answer:
    """What vLLM answered."""
    (completion,) = output.outputs
    return Answer(
        list(completion.token_ids),
        [step[i].logprob for step, i in zip(completion.logprobs, completion.token_ids, strict=True)],
    )


def largest_difference(reference: Reference, engine: Any) -> float:
    """Of all cases, asked at once; infinite where an answer has other ids."""
    from vllm import SamplingParams

    settings = [
        SamplingParams(temperature=0, max_tokens=case.max_tokens, logprobs=0, detokenize=False) for case in CASES
    ]
    outputs = engine.generate([reference.prompt(case) for case in CASES], settings, use_tqdm=False)
    return max(
        reference.answer(case).difference(answer_of(output)) for case, output in zip(CASES, outputs, strict=True)
    )
