"""`fusion-hf chat`: a conversation about an image in the terminal, or line by line through a pipe."""

import argparse
import contextlib
import sys
from typing import Any

from fusion_hf.cli.lean_imports import lean_imports
from fusion_hf.cli.model_options import (
    IMAGE_HELP,
    answer_settings,
    find_model,
    model_options,
    read_sampling,
    sampling_options,
    takes_lean_imports,
)
from fusion_hf.cli.terminal import check_image_exists, one_line, printable
from fusion_hf.common.errors import InputError

EXIT, RESET = "/exit", "/reset"


def add_parser(commands: Any) -> None:
    """Add `chat` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "chat",
        parents=[model_options(), sampling_options()],
        help="Chat about an image in the terminal.",
        description="Chat about an image in the terminal, or ask questions through a pipe, one per line. /reset "
        "starts a new conversation and /exit ends the program.",
        examples=("fusion-hf chat photo.jpg", "fusion-hf chat photo.jpg --model DIR_OR_REPO --temperature 0.7"),
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument(
        "--fast",
        action="store_true",
        help="Keep the cache of the language model between questions, so that later answers start sooner. The image "
        "then stays encoded for the first question, which may change later answers.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Chat until `/exit`, the end of the input or Ctrl-C, and return the exit status."""
    if sys.stdin is None:
        raise InputError("The standard input is closed. Questions are read from it, one per line.")
    sampling = read_sampling(arguments)
    if arguments.fast and sampling.num_beams > 1:
        raise InputError(f"`--num-beams` must be 1 with `--fast`, got {sampling.num_beams}.")
    check_image_exists(arguments.image)
    arguments.model = find_model(arguments)

    with lean_imports(takes_lean_imports(arguments)):
        from fusion_hf.cli.model_loading import AnswerStreamer, load_chat_model
        from fusion_hf.inference.conversation import Conversation

        chat_model = load_chat_model(arguments)
    image = chat_model.open_image(arguments.image)
    conversation = Conversation(
        chat_model, image, sampling=sampling, fast=arguments.fast, **answer_settings(arguments)
    )
    streamer = AnswerStreamer.of(chat_model, sampling)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (arrow keys in `input`)
        sys.stdout.write(
            f"Ask a question about {one_line(arguments.image)}. {RESET} starts a new conversation, {EXIT} ends.\n"
        )
    try:
        while (question := input("> " if is_terminal else "").strip()) != EXIT:
            if question == RESET:
                conversation.reset()
            elif question.startswith("/"):
                sys.stderr.write(f"error: A command must be {RESET} or {EXIT}, got {one_line(question)}.\n")
            elif question:
                try:
                    answer = conversation.ask(question, streamer)
                    if streamer is None:
                        sys.stdout.write(f"{printable(answer)}\n")
                        sys.stdout.flush()
                except InputError as error:
                    sys.stderr.write(
                        f"error: {one_line(error)} Ask a shorter question, or start a new conversation with {RESET}.\n"
                    )
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            sys.stdout.write("\n")
    return 0
