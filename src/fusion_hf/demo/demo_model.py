"""One visitor's image and conversation, and the one model that answers all visitors in turn."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.demo.timing import AnswerStream, AnswerTimes, ImageTimes, now
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.conversation import Conversation
from fusion_hf.inference.image_features import ImageFeatures
from fusion_hf.maps.attention_recorder import AttentionRecorder
from fusion_hf.maps.view import Maps, View, Word, find_words
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import open_image

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # of an upload: 150 megabytes while it is read
MAX_QUESTION = 2_000  # characters
MESSAGES_PER_TURN = 2
MAX_SHOWN_SIDE = 1_024  # pixels of the image that a session keeps

Result = TypeVar("Result")


class DemoTurn(NamedTuple):
    """A question, its answer with the places of its words among its tokens, and what the answer took."""

    question: str
    answer: str
    words: tuple[Word, ...]
    query_len: int
    times: AnswerTimes


@dataclass(eq=False)
class Session:
    """What one visitor sees: `image` at most MAX_SHOWN_SIDE pixels wide and high, `tiles` `(5, H, W, 3)` bytes."""

    image: Image.Image
    tiles: np.ndarray
    image_features: ImageFeatures
    conversation: Conversation
    times: ImageTimes
    turns: list[DemoTurn] = field(default_factory=list)
    maps: dict[int, Maps] = field(default_factory=dict)  # of answers, as they are wanted

    def reset(self) -> None:
        """Forget all questions and answers."""
        self.conversation.reset()
        self.turns, self.maps = [], {}


class DemoModel:
    """
    A model that serves any number of sessions. Its calls run in one thread, one after the other, whatever calls it.

    Args:
        chat_model: Who answers.
        max_new_tokens, query_len, image_token_grid: see `ChatModel.answer`; a question can have another `query_len`.

    Raises:
        InputError: if `query_len` or `image_token_grid` is impossible.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        max_new_tokens: int,
        query_len: int | None = None,
        image_token_grid: int | None = None,
    ):
        self.chat_model = chat_model
        self.max_new_tokens = max_new_tokens
        self.budget = chat_model.token_budget(query_len, image_token_grid)
        self.query_lens = sorted({*chat_model.model.config.query_lens, self.budget.query_len})
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def run(self, work: Callable[..., Result], *arguments: object) -> Result:
        """`work(*arguments)` when it is its turn."""
        return self._worker.submit(work, *arguments).result()

    def open_session(self, path: Path) -> Session:
        """Open a session about the image in a file.

        Raises:
            InputError: if it cannot be read or is too large.
        """
        return self.run(self._open_session, open_upload(self.chat_model, path))

    def _open_session(self, image: Image.Image) -> Session:
        begin = now()
        processor = self.chat_model.processor.image_processor
        tiles = processor([image], as_bytes=True, return_tensors="np")["pixel_values"][0]
        cut = now()
        image_features = self.chat_model.encode_cut_image(tiles)  # for questions of every `query_len`
        times = ImageTimes(cut - begin, now() - cut)
        image.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
        settings = {**self.budget._asdict(), "image_features": image_features}
        conversation = Conversation(self.chat_model, image, self.max_new_tokens, **settings)
        return Session(image, tiles.transpose(0, 2, 3, 1), image_features, conversation, times)

    def ask(self, session: Session, question: str, query_len: int) -> Iterator[str]:
        """
        The answer so far, again and again while it grows. The turn is part of the session when the last one is taken;
        closing the iterator earlier stops the model and leaves the session as it was.

        Raises:
            InputError: if the question is empty or too long, `query_len` is none of `query_lens`, or the conversation
                exceeds the model's maximum.
        """
        question = check_question(question)
        if query_len not in self.query_lens:
            raise InputError(f"query_len is {query_len}; allowed: {', '.join(map(str, self.query_lens))}.")
        session.conversation.budget = self.budget._replace(query_len=query_len)
        yield from self._stream(session, question)

    def _stream(self, session: Session, question: str) -> Iterator[str]:
        stream = AnswerStream(self.chat_model.processor.tokenizer)
        future = self._worker.submit(session.conversation.ask, question, stream)
        future.add_done_callback(stream.close)
        try:
            text = ""
            for piece in stream:
                text += piece
                yield text.strip()
            answer = future.result()
        finally:
            stream.stop()  # which does nothing to an answer that is complete
            if not future.cancel():
                wait([future])  # the next question must not meet this one
        words = find_words(self.chat_model.processor.tokenizer, stream.ids)
        session.turns.append(DemoTurn(question, answer, words, session.conversation.budget.query_len, stream.times()))
        yield answer

    def word_map(self, session: Session, turn: int, word: int) -> np.ndarray:
        """
        Where a word of an answer looked in `session.image`: `(H, W)`, a mean over layers and heads. For the first
        word of an answer the model answers once more.
        """
        if turn not in session.maps:
            session.maps[turn] = self.run(self._read_attention, session, turn)
        return session.maps[turn].on_image(session.turns[turn].words[word], session.image.size).mean(0)

    def _read_attention(self, session: Session, turn: int) -> Maps:
        chat_model, config = self.chat_model, self.chat_model.model.config
        messages = session.conversation.messages[: MESSAGES_PER_TURN * turn + 1]
        budget = self.budget._replace(query_len=session.turns[turn].query_len)
        inputs = chat_model.prepare(messages, image_features=session.image_features, **budget._asdict())
        with AttentionRecorder(chat_model.model, inputs["input_ids"], layer_groups=1) as recorder:
            chat_model.generate(inputs, self.max_new_tokens)
        view = View.of(config, 1, session.image.size)
        return Maps(recorder.rows().answer.float().numpy(), recorder.language_groups, session.turns[turn].words, view)


def open_upload(chat_model: ChatModel, path: Path) -> Image.Image:
    """Open the image in an uploaded file, as upright RGB.

    Raises:
        InputError: if it cannot be read or is too large.
    """
    processor, name = chat_model.processor.image_processor, short_name(path.name)
    try:
        limit = min(MAX_PIXELS, processor.max_image_pixels)
        return open_image(path, limit, MAX_UPLOAD_BYTES, exif_transpose=processor.exif_transpose)
    except ImageError as error:
        raise InputError(f"{name}: {error}") from error


def check_question(question: str) -> str:
    """Return the question without white space around it.

    Raises:
        InputError: if it is empty or too long.
    """
    question = question.strip()
    if not question:
        raise InputError("The question is empty; ask something.")
    if len(question) > MAX_QUESTION:
        raise InputError(f"The question has {len(question)} characters; allowed: {MAX_QUESTION}.")
    return question
