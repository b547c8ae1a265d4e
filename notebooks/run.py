"""Execute notebooks in fresh kernels: `python notebooks/run.py [NOTEBOOK ...]`, by default all of this folder.

The script writes the outputs in place, without times and without what differs between machines. An error in a cell
ends the run and leaves that notebook unchanged.
"""

import argparse
import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
VERSION = 4  # of the format
SECONDS = 600  # at most, of a cell
# No network, and neither progress bars nor tqdm's advice on them, whose texts differ from run to run.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress"}
PNG, JPEG = "image/png", "image/jpeg"
COLORS = 256  # of a stored image


def execute(path: Path) -> nbformat.NotebookNode:
    """
    A notebook with the outputs of a fresh kernel in its folder; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=VERSION)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=SECONDS, resources=resources, record_timing=False, coalesce_streams=True)
    client.execute(env={**os.environ, **ENVIRONMENT})
    notebook.metadata["language_info"] = {"name": "python"}  # not the version
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PNG in output.get("data", {}):
                output.data[PNG] = shrink(output.data[PNG])
                output.data.pop(JPEG, None)  # the same image again
    return notebook


def shrink(png: str) -> str:
    """A PNG in few colours, which take less space; both in base64."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks in place.")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all beside this file")
    for path in parser.parse_args(argv).notebooks or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
