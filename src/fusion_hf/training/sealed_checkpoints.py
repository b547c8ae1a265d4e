"""Let a trainer write checkpoints and finished models atomically."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fusion_hf.training.checkpoints import rotate, saving, seal
from fusion_hf.training.collator import FusionDataCollator
from fusion_hf.training.distributed import plain_class, whole_weights


class SealedCheckpoints(Trainer):
    """The part of the trainer that saves. `checkpoints.py` defines when a checkpoint is complete."""

    data_collator: FusionDataCollator

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model. Checkpoints may be sharded as the launch configuration says. A finished model is always
        saved unsharded.
        """
        with nullcontext() if _internal_call else whole_weights(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with plain_class(self.model):
            super()._save(output_dir, state_dict)
        self.data_collator.processor.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, which counts only when all its files exist, and delete older ones only after that."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(folder, remove=self.args.should_save):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit, keep=[] if best is None else [Path(best)])
