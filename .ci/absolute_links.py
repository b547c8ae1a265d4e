"""Make the relative links of a Markdown file absolute, for pages that show it outside of the repository, such as PyPI.

python .ci/absolute_links.py README.md https://github.com/OWNER/NAME v1.0.0
"""

import re
import sys
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".svg", ".jpg", ".gif")
# [text](target), ![text](target) and src="target", where the target is neither an address nor a heading
LINK = re.compile(r'(\]\(|src=")(?!https?://|mailto:|#)([^)"\s]+)')


def make_links_absolute(text: str, repository: str, revision: str) -> str:
    """
    Make the relative links in a Markdown text absolute.

    Args:
        text: The Markdown text.
        repository: Address of the repository on GitHub, without a slash at its end.
        revision: Branch or tag that the links lead to.

    Returns:
        The text, where links to images lead to the files themselves and all others to GitHub's pages.
    """

    def absolute(match: re.Match[str]) -> str:
        opening, target = match.groups()
        view = "raw" if target.partition("#")[0].endswith(IMAGE_SUFFIXES) else "blob"
        return f"{opening}{repository}/{view}/{revision}/{target}"

    return LINK.sub(absolute, text)


if __name__ == "__main__":
    path, repository, revision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    path.write_text(make_links_absolute(path.read_text("utf-8"), repository, revision), "utf-8")
