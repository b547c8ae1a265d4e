"""Scripts in a process that has a model folder, but neither the package nor a network."""

import os
import subprocess
import sys
from pathlib import Path

BLOCK = """
import sys, socket
sys.modules["fusion_hf"] = None  # importing the package fails, as if it were not installed

def refuse(*args, **kwargs):
    raise OSError("the network is off")

socket.socket.connect = refuse
FOLDER = sys.argv[1]
from PIL import Image, ImageDraw
image = Image.new("RGB", (64, 64), (240, 240, 240))
ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 0, 0))
messages = [{"role": "user", "content": [
    {"type": "image", "image": image}, {"type": "text", "text": "what color is the shape?"}]}]
"""


def run(script: str, *arguments: object, cache: Path, packages: Path | None = None) -> list[str]:
    """
    The lines that a script prints. It finds the first argument as FOLDER, all of them in `sys.argv`, and a question
    about a red circle as `messages`.

    Args:
        cache: an empty folder for the code that is copied out of model folders; also the working directory.
        packages: a folder whose packages come before those of the environment.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cache),
        "PYTHONPATH": str(packages or ""),
    }
    command = [sys.executable, "-c", BLOCK + script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
