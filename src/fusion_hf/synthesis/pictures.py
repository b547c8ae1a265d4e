"""Pictures of a pair as one."""

from PIL import Image

GAP = 16  # pixels between the two, at a height of 512
GAP_HEIGHT = 512
WHITE = (255, 255, 255)


def compose_pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures side by side, the right one in the left one's height, with a white gap between them."""
    left, right = left.convert("RGB"), right.convert("RGB")
    if right.height != left.height:
        width = max(round(right.width * left.height / right.height), 1)
        right = right.resize((width, left.height), Image.Resampling.BICUBIC)
    gap = max(round(GAP * left.height / GAP_HEIGHT), 1)
    whole = Image.new("RGB", (left.width + gap + right.width, left.height), WHITE)
    whole.paste(left, (0, 0))
    whole.paste(right, (left.width + gap, 0))
    return whole
