"""What a training run can be told: transformers' `TrainingArguments` and the keys that FUSION adds."""

from dataclasses import dataclass

from transformers import TrainingArguments

from fusion_hf.common.errors import InputError
from fusion_hf.training.distributed import choose_cpu, spare_tf32
from fusion_hf.training.recipe_keys import OwnArguments

# transformers' arguments that FusionTrainer does not ask: the allowed value, and what there is instead
UNHEARD = {
    "label_smoothing_factor": (0.0, "FUSION's loss has no smoothing: override FusionTrainer.compute_loss for another"),
    "train_sampling_strategy": ("random", "group_by says in which order records come"),
    "average_tokens_across_devices": (True, "loss_average says what the loss of a step is the mean of"),
}


@dataclass
class FusionTrainingArguments(OwnArguments, TrainingArguments):
    """
    Hold transformers' arguments, with a few defaults that suit FUSION, and the keys of a recipe that are ours.

    Raises:
        InputError: for an impossible value of one of our keys; names the key, the value and what is allowed.

    Example:

    ```python
    >>> from fusion_hf.training import FusionTrainingArguments
    >>> arguments = FusionTrainingArguments(output_dir="run", train=["projectors", "samplers"], query_lens=[4, 16])
    >>> arguments.train
    ['projectors', 'samplers']

    ```
    """

    # transformers' defaults that do not suit
    remove_unused_columns: bool = False  # records become batches in the collator
    use_cache: bool = True  # it is written into the model's configuration, where it would turn the cache off
    logging_nan_inf_filter: bool = False  # a loss that is no number ends the run instead
    ddp_find_unused_parameters: bool | None = False  # every parameter takes part in every step
    prediction_loss_only: bool = True  # an evaluation that gathered logits would need them all in memory

    def __post_init__(self) -> None:
        self.check()
        for name, (allowed, instead) in UNHEARD.items():
            if getattr(self, name) != allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {allowed!r}. {instead}.")
        if self.train is None:
            self.train = self.default_train
        spare_tf32(self)
        choose_cpu(self)
        super().__post_init__()
