"""`fusion-hf demo`: a web page on which you ask a model about an image."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from typing import Any

from fusion_hf.cli.argument_types import LARGEST_PORT, whole_number
from fusion_hf.cli.model_options import answer_settings, find_model, model_options
from fusion_hf.common.errors import InputError

HOST, PORT = "127.0.0.1", 7860
UPLOADS = "GRADIO_TEMP_DIR"


def add_parser(commands: Any) -> None:
    """Add `demo` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "demo",
        parents=[model_options()],
        help="Serve a web page with a chat, attention maps and timings.",
        description="Serve a web page on which you ask the model about an image. Everyone who can reach the address "
        "can use the page; by default, that is only this computer. Requires the extra `demo`.",
        examples=("fusion-hf demo", "fusion-hf demo --model DIR_OR_REPO --port 8080"),
    )
    parser.add_argument(
        "--host", default=HOST, help="Address to listen on (default: %(default)s, this computer only)."
    )
    parser.add_argument(
        "--port", type=whole_number(1, LARGEST_PORT), default=PORT, help="Port to listen on (default: %(default)s)."
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, and return the exit status."""
    arguments.model = find_model(arguments)
    with tempfile.TemporaryDirectory(prefix="fusion-demo-", ignore_cleanup_errors=True) as uploads:
        os.environ[UPLOADS] = uploads  # before gradio is imported; its own folder is shared and stays
        try:
            from fusion_hf.demo.page import build_page, launch_settings
        except ImportError as error:
            raise InputError(f"The demo requires the extra `demo` ({error}): pip install 'fusion_hf[demo]'") from error
        from fusion_hf.cli.model_loading import load_chat_model
        from fusion_hf.demo.demo_model import DemoModel

        chat_model = load_chat_model(arguments)
        page = build_page(DemoModel(chat_model, **answer_settings(arguments)))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _, address, _ = page.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                quiet=True,
                prevent_thread_lock=True,
                **launch_settings(),
            )
        except OSError as error:
            raise InputError(f"The page cannot listen at {arguments.host}, port {arguments.port}: {error}") from error
        sys.stdout.write(f"The page is at {address}. Press Ctrl-C to stop.\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        page.close(verbose=False)
    return 0
