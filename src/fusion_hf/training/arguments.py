"""What a training run can be told: transformers' `TrainingArguments` and the keys that FUSION adds."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from fusion_hf.configuration_fusion import is_perfect_square
from fusion_hf.errors import InputError
from fusion_hf.training.distributed import choose_cpu, spare_tf32
from fusion_hf.training.parts import PARTS, VISION_TOWER

ON_BROKEN = ("error", "skip")
ON_TRUNCATED = ("error", "load")
GROUP_BY = ("modality_length", "none")
TOKENS, MICRO_BATCHES = LOSS_AVERAGES = ("tokens", "micro_batches")
STEP, MICRO_BATCH = QUERY_LEN_DRAWS = ("step", "micro_batch")
SAVE_DTYPES = ("float32", "bfloat16", "float16")
# transformers' arguments that FusionTrainer does not ask: the allowed value, and what there is instead
UNHEARD = {
    "label_smoothing_factor": (0.0, "FUSION's loss has no smoothing: override FusionTrainer.compute_loss for another"),
    "train_sampling_strategy": ("random", "group_by says in which order records come"),
    "average_tokens_across_devices": (True, "loss_average says what the loss of a step is the mean of"),
}


def _key(default: Any, text: str) -> Any:
    """A field with its line in the table of docs/training.md."""
    return field(default=default, metadata={"help": text})


@dataclass
class FusionTrainingArguments(TrainingArguments):
    """
    transformers' arguments, with a few defaults that suit FUSION, and the keys of a recipe that are ours.

    Raises:
        InputError: for an impossible value of one of our keys; names the key, the value and what is allowed.
    """

    model: str | None = _key(None, "folder or Hub repository of the FUSION to start from")
    data: str | None = _key(None, "mixture (YAML), JSON, JSONL, Parquet, folder of pictures or tar shards, or Hub id")
    data_root: str | None = _key(None, "folder of the files and pictures that `data` names; default: that of `data`")
    data_cache: str | None = _key(None, "folder of the index of `data`; default: in the Hugging Face cache")
    streaming: bool = _key(False, "read `data` in its own order, without an index")
    on_broken: str = _key("error", "`error` ends the run at a broken record, `skip` leaves it out and counts it")
    max_skipped: int = _key(100, "so many records may be skipped; one more ends the run")
    on_truncated: str = _key("error", "`error`: pictures that end too early are broken; `load`: they are trained on")
    max_image_pixels: int | None = _key(None, "pictures with more are broken; default: the image processor's number")
    eval_data: str | None = _key(None, "held-out records, as `data`")
    eval_samples: int = _key(0, "so many records of `eval_data` are answered at each evaluation, and compared exactly")
    eval_max_new_tokens: int = _key(32, "longest answer there")
    global_batch_size: int | None = _key(None, "records per optimizer step, over all processes and accumulation")
    train: list[str] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "parts that are trained, the others stay as they are; default: all, with LoRA not the tower"
        },
    )
    vision_tower_learning_rate: float | None = _key(None, "of the tower; default: `learning_rate`")
    projector_learning_rate: float | None = _key(None, "of both projectors; default: `learning_rate`")
    sampler_learning_rate: float | None = _key(None, "of the samplers; default: `learning_rate`")
    query_lens: list[int] | None = field(
        default=None, metadata={"help": "latent tokens, drawn for each step; default: the model's list"}
    )
    query_len_draw: str = _key(
        "step", "`step`: all of a step has one of `query_lens`; `micro_batch`: a part of it has"
    )
    loss_average: str = _key(
        "tokens", "`tokens`: mean over a step's tokens; `micro_batches`: mean of its parts' means"
    )
    max_length: int | None = _key(None, "longer conversations are cut on the right; default: the tokenizer's maximum")
    group_by: str = _key("modality_length", "`modality_length`: steps of like records, as upstream; or `none`")
    lora_rank: int = _key(0, "rank of LoRA in the language model; 0: no LoRA")
    lora_alpha: float | None = _key(None, "scale of LoRA; default: twice the rank")
    lora_dropout: float = _key(0.05, "dropout before LoRA")
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "names of linear layers; default: all of the language model's"}
    )
    load_in_4bit: bool = _key(False, "keep the frozen language model in 4 bits (bitsandbytes)")
    save_dtype: str = _key("float32", "type of the finished model's weights; checkpoints are always exact")
    peak_tflops: float | None = _key(None, "of one device, for the utilisation; default: a matrix product's, measured")

    # transformers' defaults that do not suit
    remove_unused_columns: bool = False  # records become batches in the collator
    use_cache: bool = True  # it is written into the model's configuration, where it would turn the cache off
    logging_nan_inf_filter: bool = False  # a loss that is no number ends the run instead
    ddp_find_unused_parameters: bool | None = False  # every parameter takes part in every step
    prediction_loss_only: bool = True  # an evaluation that gathered logits would need them all in memory

    def __post_init__(self) -> None:
        _allow("on_broken", self.on_broken, ON_BROKEN)
        _allow("group_by", self.group_by, GROUP_BY)
        _allow("on_truncated", self.on_truncated, ON_TRUNCATED)
        _allow("query_len_draw", self.query_len_draw, QUERY_LEN_DRAWS)
        _allow("loss_average", self.loss_average, LOSS_AVERAGES)
        _allow("save_dtype", self.save_dtype, SAVE_DTYPES)
        for name, (allowed, instead) in UNHEARD.items():
            if getattr(self, name) != allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {allowed!r}. {instead}.")
        if self.train is None:
            self.train = [part for part in PARTS if part != VISION_TOWER or not self.lora_rank]
        for part in self.train:
            _allow("train", part, PARTS)
        if not self.train:
            raise InputError(f"train is empty; allowed: some of {', '.join(PARTS)}.")
        for length in self.query_lens if self.query_lens is not None else [1]:
            if not is_perfect_square(length):
                raise InputError(f"query_lens holds {length}; allowed: perfect squares (1, 4, 9, 16, ...).")
        if self.query_lens == []:
            raise InputError("query_lens is empty; allowed: at least one perfect square.")
        for name, least in (("max_skipped", 0), ("eval_samples", 0), ("eval_max_new_tokens", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: {least} or more.")
        if self.max_image_pixels is not None and self.max_image_pixels < 1:
            raise InputError(f"max_image_pixels is {self.max_image_pixels}; allowed: 1 or more.")
        if self.load_in_4bit and not self.lora_rank:
            raise InputError("load_in_4bit is true, but lora_rank is 0; 4-bit weights do not train: set lora_rank.")
        spare_tf32(self)
        choose_cpu(self)
        super().__post_init__()


def _allow(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
