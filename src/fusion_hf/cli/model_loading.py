"""Loading a model for a command, and answers that appear word by word."""

import argparse
import logging
import sys
import warnings

import huggingface_hub
import transformers
from transformers import PreTrainedTokenizerBase, TextStreamer

from fusion_hf.cli.model_options import silence_hub
from fusion_hf.cli.terminal import printable
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.sampling_options import SamplingOptions


def load_chat_model(arguments: argparse.Namespace) -> ChatModel:
    """Load the model that the arguments name, on the device that they name."""
    if not arguments.debug:
        silence_libraries()
    return ChatModel.load(arguments.model, arguments.device, arguments.dtype, bits=arguments.bits)


def silence_libraries(bars: bool = False) -> None:
    """
    No advice and no loading bars of the libraries; downloads from the Hub keep their bars.

    Args:
        bars: keep those of loading and writing as well.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes the type of each product
    if not bars:
        transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which the line before has disabled as well
    silence_hub()


class AnswerStreamer(TextStreamer):
    """Writes an answer to the standard output while it is made, and ends its line."""

    @classmethod
    def of(cls, chat_model: ChatModel, sampling: SamplingOptions) -> "AnswerStreamer | None":
        """Make a streamer of a model's answers; None for a beam search, which chooses an answer at its end."""
        return cls(chat_model.processor.tokenizer) if sampling.num_beams == 1 else None

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each further piece of the answer."""
        text = printable(text)
        if not self.has_begun:
            text = text.lstrip()
        self.has_begun = (self.has_begun or bool(text)) and not stream_end
        sys.stdout.write(text + "\n" if stream_end else text)
        sys.stdout.flush()
