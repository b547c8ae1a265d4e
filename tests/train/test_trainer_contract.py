"""What FusionTrainer takes from the inside of transformers' Trainer: each name that it overrides is still there."""

import inspect

import pytest
from tests.helpers.overrides import overridden
from transformers import Trainer

from fusion_hf.training.memory_fitting import MemoryFitting
from fusion_hf.training.record_loading import RecordLoading
from fusion_hf.training.sealed_checkpoints import SealedCheckpoints
from fusion_hf.training.trainer import FusionTrainer

PRIVATE = {
    RecordLoading: {"_get_train_sampler"},
    MemoryFitting: {"_inner_training_loop", "_run_epoch"},
    SealedCheckpoints: {"_save", "_save_checkpoint"},
    FusionTrainer: {"_prepare_inputs", "_get_num_items_in_batch", "_get_grad_norm"},
}
OWN = {"_split_step", "_count", "_measure"}  # private names that Trainer does not have


@pytest.mark.parametrize("part", PRIVATE, ids=lambda part: part.__name__)
def test_private_names_are_trainers(part: type):
    named = {name for name, value in vars(part).items() if inspect.isfunction(value) and not name.startswith("__")}
    private = {name for name in named if name.startswith("_")} - OWN
    assert private == PRIVATE[part]
    assert private <= overridden(part, "transformers")


@pytest.mark.parametrize("part", PRIVATE, ids=lambda part: part.__name__)
def test_they_take_trainers_arguments(part: type):
    for name in PRIVATE[part]:
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (part, Trainer))
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in ours.values())
        missing = [argument for argument in theirs if argument not in ours]
        assert takes_any or not missing, f"{name} does not take {missing}"


def test_no_private_name_of_trainer_is_taken_by_chance():
    assert not [name for name in OWN if hasattr(Trainer, name)]
