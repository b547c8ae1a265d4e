"""Check that a model folder loads and answers without this package. `publishing` runs it in a separate process.

The package cannot be imported there and the network is off, so that only the content of the folder counts.
"""

import socket
import sys
from typing import Any

sys.modules["fusion_hf"] = None  # type: ignore[assignment]

QUESTION = "what color is the shape?"
MAX_NEW_TOKENS = 4


def refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError("the network is off")


def answer(folder: str) -> str:
    """Answer a question about a drawn image. End the process if a tensor is missing or left over."""
    from PIL import Image, ImageDraw
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{kind}: {len(info[kind])} tensors, such as {sorted(map(str, info[kind]))[0]}")
    image = Image.new("RGB", (64, 64), (240, 240, 240))
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 0, 0))
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    socket.socket.connect = refuse  # type: ignore[method-assign]
    sys.stdout.write(answer(sys.argv[1]))
