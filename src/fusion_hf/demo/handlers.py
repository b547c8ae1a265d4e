"""What happens when the page's components are used. Needs the extra `demo`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.demo.demo_model import DemoModel, Session
from fusion_hf.demo.views import answer_choices, chat_messages, draw_overlay, draw_tiles, times_table

NO_IMAGE = "Show an image first."
Values = tuple[Any, ...]  # new values of components


class Handlers:
    """
    Methods for gradio's events. A visitor's `Session`, or None before there is an image, comes from gradio's state.

    Most give new values of the same components: session, chat, question, times, answer, word, overlay.

    Args:
        demo_model: Who answers all visitors.
        uploads: the folder in which gradio puts what visitors upload.
    """

    def __init__(self, demo_model: DemoModel, uploads: Path):
        self.demo_model = demo_model
        self.uploads = uploads.resolve()

    def open_session(self, upload: dict[str, Any] | None) -> Values:
        """Open a new session about an uploaded image; and its overview and tiles behind the other values."""
        kept = gr.skip()  # an example brings image and question at once
        if upload is None:
            return *self.show(None, kept), None, None
        try:
            session = self.demo_model.open_session(self._uploaded(upload))
        except InputError as error:
            gr.Warning(str(error))
            return *self.show(None, kept), None, None
        return *self.show(session, kept), *draw_tiles(session.tiles)

    def _uploaded(self, upload: dict[str, Any]) -> Path:
        """The uploaded file; gradio lets a client name any other one if it leaves out a field."""
        path = self.uploads.joinpath(upload["path"] or "").resolve()
        if not path.is_relative_to(self.uploads) or not path.is_file():
            raise InputError("The image is no uploaded file; upload it.")
        return path

    def ask(self, question: str, query_len: int, session: Session | None) -> Iterator[Values]:
        """Yield the conversation while an answer grows."""
        if session is None:
            gr.Warning(NO_IMAGE)
            yield self.show(None, question)
            return
        try:
            for answer in self.demo_model.ask(session, question, query_len):
                yield session, chat_messages(session, question, answer), "", *(gr.skip() for _ in range(4))
        except InputError as error:
            gr.Warning(str(error))
            yield self.show(session, question)
            return
        yield self.show(session)

    def reset(self, session: Session | None) -> Values:
        """Begin a new conversation about the same image."""
        if session is not None:
            session.reset()
        return self.show(session)

    def show(self, session: Session | None, question: Any = "") -> Values:
        """What there is: all answers, and the words of the last one to choose from."""
        turns = [] if session is None else session.turns
        last = len(turns) - 1 if turns else None
        return (
            session,
            chat_messages(session),
            question,
            times_table(session),
            gr.update(choices=answer_choices(turns), value=last),
            *self.choose_answer(last, session),
        )

    def choose_answer(self, answer: int | None, session: Session | None) -> Values:
        """New values of word and overlay."""
        words = () if session is None or answer is None else session.turns[answer].words
        return gr.update(choices=[(word.text, index) for index, word in enumerate(words)], value=None), None

    def choose_word(self, word: int | None, answer: int | None, session: Session | None) -> Image.Image | None:
        """Where the answer's word looked."""
        if session is None or answer is None or word is None:
            return None
        return draw_overlay(session.image, self.demo_model.word_map(session, answer, word))
