"""Checks of `parity.json`, the certificate that `fusion-hf verify` writes, and its section in the model card."""

import hashlib
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError
from fusion_hf.hub.folders import read_config

PARITY = "parity.json"
HEADING = "## Parity with the authors' code"
BLOCK_BYTES = 2**20


def digest_file(path: Path) -> str:
    """Return the SHA-256 digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_parity(folder: Path) -> None:
    """
    Check that a folder's certificate, if it has one, shows equal results and belongs to its weights.

    Args:
        folder: Model folder.

    Raises:
        InputError: If the certificate does not fit. The message names the file and the problem.
    """
    path = folder / PARITY
    if not path.is_file():
        return
    report = read_config(path)
    if report.get("equal") is not True:
        raise InputError(f"{path} shows that the folder differs from the authors' model. Convert again or remove it.")
    try:
        digests = dict(report["weights"]["folder"])
        render_parity(report)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a certificate of `fusion-hf verify`: {type(error).__name__}: {error}."
        ) from error
    for name, digest in digests.items():
        if Path(name).name != name or not (folder / name).is_file() or digest_file(folder / name) != digest:
            raise InputError(
                f"{path} does not belong to {name}. Run `fusion-hf verify` again or remove the certificate."
            )


def card_with_parity(folder: Path, card: str) -> str:
    """Append the results of a folder's certificate to its card, unless there is none or the card shows it already."""
    path = folder / PARITY
    if not path.is_file() or HEADING in card:
        return card
    return f"{card.rstrip()}\n\n{render_parity(read_config(path))}"


def render_parity(report: dict[str, Any]) -> str:
    """
    Render a certificate as a Markdown section of a model card.

    Args:
        report: Content of `parity.json`.

    Returns:
        The section.

    Raises:
        KeyError, TypeError, ValueError: If the content is not that of a certificate.
    """
    authors, asked, weights = report["authors"], report["questions"], report["weights"]
    commit = f", commit `{authors['commit'][:12]}`" if authors["commit"] else ""
    rows = [
        f"| weights | {int(weights['compared']):,} tensors | equal to the bit | |",
        f"| ids | {len(asked)} prompts and questions | equal | |",
    ]
    for stage in report["stages"]:
        error, tolerance = float(stage["relative"]), float(stage["tolerance"])
        rows.append(f"| {stage['name']} | {int(stage['parts'])} | {error:.1e} | {tolerance:.0e} |")
    rows.append(f"| tokens | {int(report['num_tokens'])} of each answer | equal | |")
    return "\n".join(
        [
            HEADING,
            "",
            f"`fusion-hf verify` ran this folder and the authors' code ({authors['model_class']}{commit}, "
            f"transformers {authors['versions']['transformers']}) on the same {len(asked)} images and questions, in "
            f"{report['dtype']} with {int(report['query_len'])} latent tokens:",
            "",
            "| stage | compared | largest relative error | tolerance |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Every layer's figure, the versions and the digests of all weights are in [{PARITY}]({PARITY}).",
            "",
        ]
    )
