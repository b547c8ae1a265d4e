"""`fusion-hf serve`: a server with OpenAI's protocol."""

import argparse
import os
from pathlib import Path
from typing import Any

from fusion_hf.cli.values import positive
from fusion_hf.errors import InputError
from fusion_hf.serving.limits import Limits

HOST, PORT, LAST_PORT = "127.0.0.1", 8000, 2**16 - 1
INSTALL = "pip install 'fusion_hf[serve]'"
DEFAULTS = Limits()


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Tell the command line about `serve`."""
    parser = commands.add_parser(
        "serve",
        parents=[shared],
        help="answer over HTTP, with OpenAI's protocol",
        description="Answer over HTTP with OpenAI's protocol: POST /v1/chat/completions, GET /v1/models, GET /health.",
    )
    parser.add_argument("--host", default=HOST, help="address to listen on; default: %(default)s, this machine only")
    parser.add_argument(
        "--port", type=_port, default=PORT, metavar="N", help="default: %(default)s; 0: any free one, which is printed"
    )
    parser.add_argument("--name", help="the model's name for clients; default: that of its folder or repository")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that clients must send; default: none"
    )
    parser.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="fetch pictures from this host, if its addresses are public; may be repeated; default: from none",
    )
    parser.add_argument(
        "--allow-private-image-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="the same, for a host whose addresses may be private or this machine's",
    )
    for option, value, text in _limit_options():
        help_text = f"{text}; default: %(default)s"
        parser.add_argument(option, type=positive, default=value, metavar="N", help=help_text)
    parser.add_argument(
        "--queue-length",
        type=_whole,
        default=DEFAULTS.queue_length,
        metavar="N",
        help="requests that wait beside them; more get status 429; default: %(default)s",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is told to end; returns the exit status."""
    api_key = None if arguments.api_key_env is None else _api_key(arguments.api_key_env)
    try:
        from fusion_hf.serving.app import Service
        from fusion_hf.serving.fetch import HostPolicy
        from fusion_hf.serving.server import listen, serve
    except ImportError as error:
        raise InputError(f"Serving needs the extra `serve` ({error}): {INSTALL}") from error
    from fusion_hf.cli.session import load_assistant
    from fusion_hf.inference import nano_path

    hosts = HostPolicy.parse(arguments.allow_image_host, arguments.allow_private_image_host)
    listener = listen(arguments.host, arguments.port)  # a taken port is told before the model is loaded
    assistant = load_assistant(arguments)
    service = Service(
        assistant,
        arguments.name or _name(arguments.model or nano_path()),
        _limits(arguments),
        hosts,
        api_key,
        assistant.check_query_len(arguments.query_len),
        assistant.check_image_token_grid(arguments.image_token_grid),
    )
    serve(service, listener)
    return 0


def _api_key(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"--api-key-env is {variable}, which holds no key; allowed: printable ASCII characters.")
    return key


def _name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(
        image_bytes=arguments.max_image_bytes,
        image_pixels=arguments.max_image_pixels,
        body_bytes=arguments.max_body_bytes,
        prompt_tokens=arguments.max_prompt_tokens,
        answer_tokens=arguments.max_new_tokens,
        parallel=arguments.parallel,
        queue_length=arguments.queue_length,
        seconds=arguments.max_seconds,
    )


def _limit_options() -> tuple[tuple[str, int, str], ...]:
    return (
        ("--max-image-bytes", DEFAULTS.image_bytes, "largest picture file"),
        ("--max-image-pixels", DEFAULTS.image_pixels, "largest picture"),
        ("--max-body-bytes", DEFAULTS.body_bytes, "largest request"),
        ("--max-prompt-tokens", DEFAULTS.prompt_tokens, "longest prompt, with image and latent tokens"),
        ("--parallel", DEFAULTS.parallel, "requests answered at the same time, taking turns"),
        ("--max-seconds", DEFAULTS.seconds, "longest time for a request, waiting included"),
    )


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number")
    return int(text)


def _port(text: str) -> int:
    number = _whole(text)
    if number > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: 0 to {LAST_PORT}")
    return number
