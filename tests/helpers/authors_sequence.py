"""What the authors' preprocessing makes of a conversation, by its description: it shares no code with ours.

Source: FUSION, arXiv 2504.09925, and the authors' code, which writes a message anew where it holds the image's mark,
puts a latent block before each user message and fills the first mark of a conversation with the image.
"""

from dataclasses import dataclass, field

from tokenizers import Tokenizer

IMAGE, LATENT = -200, -300
SYSTEM_8B = (
    "You are a helpful, highly intelligent language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language. Whenever an "
    "image is present in the conversation, very carefully examine it and consider its content when formulating your "
    "response."
)


@dataclass
class Layout:
    """Texts around messages: before and behind those of the system, the user and the assistant."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    between: str
    system_text: str
    first: str = ""  # what the tokenizer puts before all else


LAYOUTS = {
    "phi3": Layout(
        ("<|system|>\n", "<|end|>"),
        ("<|user|>\n", "<|end|>"),
        ("<|assistant|>\n", "<|end|>"),
        "\n",
        "You are a helpful AI assistant.",
        " ",
    ),
    "llama3": Layout(
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        "",
        SYSTEM_8B,
        "<|begin_of_text|>",
    ),
    "chatml": Layout(
        ("<|im_start|>system\n", "<|im_end|>"),
        ("<|im_start|>user\n", "<|im_end|>"),
        ("<|im_start|>assistant\n", "<|im_end|>"),
        "\n",
        SYSTEM_8B,
        "<|begin_of_text|>",  # of the tests' tokenizer, Llama's under other names
    ),
}


@dataclass
class Sequence:
    """Ids with one number for each block, in the order in which the language model reads them."""

    ids: list[int] = field(default_factory=list)
    prompt_ends: list[int] = field(default_factory=list)  # indices in `ids`
    labels: list[bool] = field(default_factory=list)
    question: str = ""


def rewrite(text: str) -> str:
    """A user message as the authors write it: `<image>`, a newline, the rest, stripped; untouched without a mark."""
    if "<image>" not in text:
        return text
    rest = text.replace("<image>", "").strip()
    return ("<image>\n" + rest).strip()


def make_sequence(
    layout: Layout, turns: list[tuple[str, str]], backend: Tokenizer, has_image: bool, add_header: bool = False
) -> Sequence:
    """
    Args:
        layout: of the chat format.
        turns: speaker (`human` or `gpt`) and text.
        backend: the tokenizer, which knows `<vision_start>` and `<vision_end>`.
        has_image: whether the first mark is the image's.
        add_header: end with the assistant's header.
    """
    # strings, and places of blocks between them, in the order of the text
    pieces: list[str | int] = [
        layout.first + layout.system[0] + layout.system_text + layout.system[1] + layout.between
    ]
    kinds = [""]
    questions = []

    def write(text: str, kind: str = "") -> None:
        pieces.append(text)
        kinds.append(kind)

    for speaker, text in turns:
        if speaker == "human":
            questions.append(text.replace("<image>", "").strip())
            write(layout.user[0])
            write("<vision_start>")
            write("", "block")
            write("<vision_end>")
            message = rewrite(text)
            if "<image>" in message:
                write("<vision_start>")
                write("", "block")
                write("<vision_end>")
                message = message.replace("<image>", "")
            write(message + layout.user[1] + layout.between)
        else:
            write(layout.assistant[0], "header")
            write(text + layout.assistant[1], "answer")
            write(layout.between)
    if add_header:
        write(layout.assistant[0], "header")

    sequence = Sequence(question="".join(questions))
    whole, spans, blocks = "", [], []
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind == "block":
            blocks.append(len(whole))
        begin = len(whole)
        whole += str(piece)
        spans.append((begin, len(whole), kind))
    encoding = backend.encode(whole, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    places = list(blocks)
    filled = False
    for number, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
        while places and places[0] <= start:
            places.pop(0)
            sequence.ids.append(IMAGE if has_image and not filled else LATENT)
            sequence.labels.append(False)
            filled = True
        sequence.ids.append(number)
        sequence.labels.append(any(begin <= start < end for begin, end, kind in spans if kind == "answer"))
    for _, end, kind in spans:
        if kind == "header":
            tokens = sum(start < end for start in starts)
            sequence.prompt_ends.append(tokens + sum(block < end for block in blocks) - 1)
    return sequence
