"""`fusion-hf chat`: a conversation about an image in the terminal, or line by line through pipes."""

import argparse
import contextlib
import sys
from typing import Any

from fusion_hf.cli.lean_imports import lean_imports
from fusion_hf.cli.model_options import answer_settings, find_model, model_options
from fusion_hf.cli.terminal import check_image_exists, one_line
from fusion_hf.common.errors import InputError

EXIT, RESET = "/exit", "/reset"


def add_parser(commands: Any) -> None:
    """Tell the command line about `chat`."""
    parser = commands.add_parser(
        "chat",
        parents=[model_options()],
        help="talk about an image",
        description="Talk about an image: a question per line. /reset begins anew, /exit leaves.",
    )
    parser.add_argument("image", metavar="IMAGE", help="an image file, or an http(s) address")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="later answers begin sooner: the image stays as seen with the first question in mind",
    )


def run(arguments: argparse.Namespace) -> int:
    """Talk until `/exit`, the end of the input or Ctrl-C; returns the exit status."""
    if sys.stdin is None:
        raise InputError("The standard input is closed; give questions there, a line each.")
    check_image_exists(arguments.image)
    arguments.model = find_model(arguments)

    with lean_imports(arguments.owns_process):
        from fusion_hf.cli.model_loading import AnswerStreamer, load_chat_model
        from fusion_hf.inference.conversation import Conversation

        chat_model = load_chat_model(arguments)
    image = chat_model.open_image(arguments.image)
    conversation = Conversation(chat_model, image, fast=arguments.fast, **answer_settings(arguments))
    streamer = AnswerStreamer(chat_model.processor.tokenizer)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (arrow keys in `input`)
        sys.stdout.write(f"{one_line(arguments.image)}: ask about it. {RESET} begins anew, {EXIT} leaves.\n")
    try:
        while (question := input("> " if is_terminal else "").strip()) != EXIT:
            if question == RESET:
                conversation.reset()
            elif question.startswith("/"):
                sys.stderr.write(f"error: {one_line(question)} is no command; allowed: {RESET}, {EXIT}.\n")
            elif question:
                try:
                    conversation.ask(question, streamer)
                except InputError as error:
                    sys.stderr.write(f"error: {one_line(error)} Ask something shorter, or begin anew with {RESET}.\n")
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            sys.stdout.write("\n")
    return 0
