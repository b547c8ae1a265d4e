"""`fusion-hf push`: a checked model folder to the Hub."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.model_options import silence_hub


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `push`."""
    parser = commands.add_parser(
        "push",
        help="check a model folder and publish it on the Hub",
        description="Check that a model folder is complete, safe and answers without this package; then upload it in "
        "one commit and tag the version.",
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a model folder")
    parser.add_argument("--repo", required=True, metavar="NAME", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--tag", metavar="VERSION", help="of this version; default: that of the package, with a v")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be sent; send nothing")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Check and publish; returns the exit status."""
    from fusion_hf.hub import publishing

    if not arguments.debug:
        silence_hub()
    tag = publishing.DEFAULT_TAG if arguments.tag is None else arguments.tag
    publishing.check_tag(tag)
    if arguments.dry_run:
        publishing.check_name(arguments.repo, "--repo")
    else:
        publishing.check_repository(arguments.repo, "--repo")
    files = publishing.check_files(arguments.model)
    if not arguments.dry_run:
        publishing.check_remote(arguments.repo, arguments.private, tag)
    publishing.check_alone(arguments.model)  # last, for it takes half a minute
    if arguments.dry_run:
        width = len(f"{sum(file.size for file in files):,}")
        for file in files:
            sys.stdout.write(f"{file.size:>{width},}  {file.name}\n")
        sys.stdout.write(f"{sum(file.size for file in files):,} bytes would be sent to {arguments.repo} as {tag}\n")
        return 0
    message = f"Upload {arguments.model.resolve().name} ({tag})"
    names = [file.name for file in files]
    url = publishing.upload(arguments.model, names, arguments.repo, arguments.private, message, tag)
    sys.stdout.write(f"{url}\n")
    return 0
