"""The training arguments: transformers' `TrainingArguments` with the keys that FUSION adds."""

from dataclasses import dataclass

from transformers import TrainingArguments

from fusion_hf.common.errors import InputError
from fusion_hf.training.distributed import choose_cpu, spare_tf32
from fusion_hf.training.recipe_keys import OwnArguments

# transformers' arguments that FusionTrainer does not support: the only allowed value, and the alternative
UNHEARD = {
    "label_smoothing_factor": (0.0, "FUSION's loss has no label smoothing: override FusionTrainer.compute_loss"),
    "train_sampling_strategy": ("random", "Use `group_by` to choose the order of records"),
    "average_tokens_across_devices": (True, "Use `loss_average` to choose how a step's loss is averaged"),
}


@dataclass
class FusionTrainingArguments(OwnArguments, TrainingArguments):
    """
    Hold the arguments of a training run: those of transformers' `TrainingArguments` and the recipe keys of FUSION.

    A few defaults of transformers are changed to suit FUSION: `remove_unused_columns=False`, `use_cache=True`,
    `logging_nan_inf_filter=False`, `ddp_find_unused_parameters=False` and `prediction_loss_only=True`. The keys of
    FUSION are described in the recipe reference.

    Raises:
        InputError: if a key of FUSION has an invalid value. The message names the key, the value and the allowed
            values.

    Example:

    ```python
    >>> from fusion_hf.training import FusionTrainingArguments
    >>> arguments = FusionTrainingArguments(output_dir="run", train=["projectors", "samplers"], query_lens=[4, 16])
    >>> arguments.train
    ['projectors', 'samplers']

    ```
    """

    # defaults that differ from transformers'
    remove_unused_columns: bool = False  # the collator needs all fields of a record
    use_cache: bool = True  # Trainer copies it into the model's configuration, and generation needs the cache
    logging_nan_inf_filter: bool = False  # a NaN or infinite loss ends the run instead
    ddp_find_unused_parameters: bool | None = False  # every trained parameter is used in every step
    prediction_loss_only: bool = True  # gathered logits would have to fit into memory

    def __post_init__(self) -> None:
        self.check()
        for name, (allowed, instead) in UNHEARD.items():
            if getattr(self, name) != allowed:
                raise InputError(f"`{name}` must be {allowed!r}, got {getattr(self, name)!r}. {instead}.")
        if self.train is None:
            self.train = self.default_train
        spare_tf32(self)
        choose_cpu(self)
        super().__post_init__()
