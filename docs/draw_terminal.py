"""Draw the terminal of docs/tutorial_own_images.md: `python docs/draw_terminal.py [FOLDER]` writes its SVG images.

An image shows the page's `console` blocks of some sections. A test runs the commands of these blocks and compares
what they write, so the images show what the commands do.
"""

import argparse
import html
import re
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "tutorial_own_images.md"
# the sections of the page that an image shows, first and last
IMAGES = {"tutorial_training.svg": (1, 4), "tutorial_publishing.svg": (5, 8)}
SECTION = re.compile(r"^## (\d+)\..*$", re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROMPT, NO_BREAK_SPACE = "$ ", "\u00a0"
COLUMNS = 100  # of the terminal: longer lines go on in the next row
FONT_SIZE, LINE_HEIGHT, CHARACTER_WIDTH, MARGIN = 13, 18, 7.9, 16  # pixels
BACKGROUND, OUTPUT, COMMAND = "#16181d", "#c8ccd4", "#8fd18f"


def console_lines(first: int, last: int) -> list[str]:
    """Return the lines of the page's `console` blocks in its sections `first` to `last`."""
    parts = SECTION.split(PAGE.read_text(encoding="utf-8"))
    sections = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    return [
        line
        for number in range(first, last + 1)
        for block in CONSOLE.findall(sections[number])
        for line in block.splitlines()
    ]


def draw(lines: list[str]) -> str:
    """Draw a terminal with these lines; commands, which begin with a prompt, have a colour of their own."""
    lines = [line[start : start + COLUMNS] for line in lines for start in range(0, max(1, len(line)), COLUMNS)]
    width = round(2 * MARGIN + CHARACTER_WIDTH * max(map(len, lines)))
    height = 2 * MARGIN + LINE_HEIGHT * len(lines)
    texts = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE_HEIGHT * row + FONT_SIZE}" '
        f'fill="{COMMAND if line.startswith(PROMPT) else OUTPUT}">{_escape(line)}</text>'
        for row, line in enumerate(lines)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="monospace" font-size="{FONT_SIZE}">',
            f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
            *texts,
            "</svg>\n",
        ]
    )


def _escape(line: str) -> str:
    return html.escape(line, quote=False).replace(" ", NO_BREAK_SPACE)  # viewers make one of several ordinary ones


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the terminal of the tutorial.")
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS / "assets", help="default: %(default)s")
    folder = parser.parse_args().folder
    for name, (first, last) in IMAGES.items():
        (folder / name).write_text(draw(console_lines(first, last)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
