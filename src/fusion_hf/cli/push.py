"""`fusion-hf push`: a checked model folder to the Hub."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.model_options import silence_hub
from fusion_hf.cli.terminal import printable


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `push`."""
    parser = commands.add_parser(
        "push",
        help="check a model folder and publish it on the Hub",
        description="Check that a model folder is complete, safe and answers without this package; then upload it in "
        "one commit. Of a training run's folder, the model is sent, and not its checkpoints, log and recipe.",
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="a model folder, or that of a finished run"
    )
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--tag", metavar="VERSION", help="of this version of the model; default: none")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be sent; send nothing")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Check and publish; returns the exit status."""
    from fusion_hf.hub import publishing

    if not arguments.debug:
        silence_hub()
    tag: str | None = arguments.tag
    if tag is not None:
        publishing.check_tag(tag)
    if arguments.dry_run:
        publishing.check_name(arguments.repo_id, "--repo-id")
    else:
        publishing.check_repository(arguments.repo_id, "--repo-id")
    files = publishing.check_files(arguments.model)
    if not arguments.dry_run:
        publishing.check_remote(arguments.repo_id, arguments.private, tag)
    if not publishing.names_licence(arguments.model):
        advice = "say it there, so that others know what they may do with the model"
        sys.stderr.write(printable(f"WARNING: {arguments.model / publishing.CARD} names no licence: {advice}.\n"))
    publishing.check_alone(arguments.model)  # last, for it takes half a minute
    as_version = "" if tag is None else f" as {tag}"
    if arguments.dry_run:
        width = len(f"{sum(file.size for file in files):,}")
        for file in files:
            sys.stdout.write(f"{file.size:>{width},}  {file.name}\n")
        sys.stdout.write(
            f"{sum(file.size for file in files):,} bytes would be sent to {arguments.repo_id}{as_version}\n"
        )
        return 0
    version = "" if tag is None else f" ({tag})"
    message = f"Upload {arguments.model.resolve().name}{version}"
    names = [file.name for file in files]
    url = publishing.upload(arguments.model, names, arguments.repo_id, arguments.private, message, tag)
    sys.stdout.write(f"{url}\n")
    return 0
