"""What a training run can be told: transformers' `TrainingArguments` and the keys that FUSION adds."""

from dataclasses import dataclass

from transformers import TrainingArguments

from fusion_hf.training.distributed import choose_cpu
from fusion_hf.training.keys import PARTS, VISION_TOWER, OwnArguments


@dataclass
class FusionTrainingArguments(OwnArguments, TrainingArguments):
    """
    transformers' arguments, with a few defaults that suit FUSION, and the keys of a recipe that are ours.

    Raises:
        InputError: for an impossible value of one of our keys; names the key, the value and what is allowed.
    """

    # transformers' defaults that do not suit
    remove_unused_columns: bool = False  # records become batches in the collator
    use_cache: bool = True  # it is written into the model's configuration, where it would turn the cache off
    logging_nan_inf_filter: bool = False  # a loss that is no number ends the run instead
    ddp_find_unused_parameters: bool | None = False  # every parameter takes part in every step
    prediction_loss_only: bool = True  # an evaluation that gathered logits would need them all in memory

    def __post_init__(self) -> None:
        self.check()
        if self.train is None:
            self.train = [part for part in PARTS if part != VISION_TOWER or not self.lora_rank]
        choose_cpu(self)
        super().__post_init__()
