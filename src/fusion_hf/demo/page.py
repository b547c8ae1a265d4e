"""The page itself: gradio's components, and what happens when they are used. Needs the extra `demo`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from starlette.middleware import Middleware

from fusion_hf.demo.demo_model import MAX_QUESTION, MAX_UPLOAD_BYTES, DemoModel
from fusion_hf.demo.examples import draw_examples
from fusion_hf.demo.guard import RequestGuard
from fusion_hf.demo.handlers import Handlers

TITLE = "FUSION"
INTRODUCTION = """# FUSION
Show an image and ask about it. More latent tokens (`query_len`) look more closely at it while the answer is made."""
EXPLANATION = """## What the model sees
The question guides how the overview is read; the four tiles are read without it."""
MAX_WAITING = 32  # calls in the queue
MAX_SESSIONS = 64  # the one that was used longest ago is forgotten
KEPT_SECONDS = 3600  # sessions and uploads
FORM_BYTES = 2**16  # what a form has beside its file
MODEL = "model"  # calls that share it come one after the other
IMAGE_HEIGHT, CHAT_HEIGHT, COLUMN_WIDTH = 260, 420, 200  # pixels
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
SYSTEM_MONO_FONTS = ("ui-monospace", "Consolas", "Menlo", "monospace")
# a small image is enlarged; a long answer's words do not fill the page
CSS = """
.picture img {object-fit: contain; width: 100%; height: 100%}
.words .wrap {max-height: 9rem; overflow-y: auto}
"""


class Parts(NamedTuple):
    """The components that something happens to."""

    session: gr.State
    image: gr.Image
    query_len: gr.Radio
    overview: gr.Image
    quarters: gr.Image
    times: gr.Markdown
    chat: gr.Chatbot
    question: gr.Textbox
    reset: gr.Button
    answer: gr.Dropdown
    word: gr.Radio
    overlay: gr.Image


def build_page(demo_model: DemoModel) -> gr.Blocks:
    """Build the page, to be launched with `launch_settings`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        parts = _lay_out(demo_model)
        _connect(Handlers(demo_model, Path(parts.image.GRADIO_CACHE)), parts)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def launch_settings() -> dict[str, Any]:
    """Return what a page is to be launched with, beside the address: nothing from or to other hosts, and bounds."""
    return {
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "footer_links": [],
        "max_file_size": MAX_UPLOAD_BYTES,
        "state_session_capacity": MAX_SESSIONS,
        "theme": gr.themes.Default(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO_FONTS),
        "css": CSS,
        "app_kwargs": {"middleware": [Middleware(RequestGuard, max_upload_bytes=MAX_UPLOAD_BYTES + FORM_BYTES)]},
    }


def _lay_out(demo_model: DemoModel) -> Parts:
    session = gr.State(None, time_to_live=KEPT_SECONDS)
    # the examples fill it from the other side of the page
    question = gr.Textbox(
        label="Question",
        placeholder="what color is the shape?",
        max_length=MAX_QUESTION,
        submit_btn=True,
        stop_btn=True,
        render=False,
    )
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column(scale=2):
            image = gr.Image(
                label="Image",
                format="png",
                sources=["upload", "clipboard"],
                height=IMAGE_HEIGHT,
                elem_id="picture",
                elem_classes="picture",
            )
            query_len = gr.Radio(
                demo_model.query_lens, value=demo_model.budget.query_len, label="query_len", elem_id="query-len"
            )
            examples = [list(example) for example in draw_examples()]
            gr.Examples(examples, [image, question], cache_examples=False)
        with gr.Column(scale=3):
            chat = gr.Chatbot(
                label="Conversation", height=CHAT_HEIGHT, render_markdown=False, buttons=[], elem_id="chat"
            )
            question.render()
            reset = gr.Button("New conversation", size="sm", elem_id="reset")
            times = gr.Markdown(elem_id="times")
    gr.Markdown(EXPLANATION)
    with gr.Row():
        with gr.Column(min_width=COLUMN_WIDTH):
            overview = _shown_image("**Overview**", "overview")
        with gr.Column(min_width=COLUMN_WIDTH):
            quarters = _shown_image("**Four tiles**", "tiles")
        with gr.Column(min_width=COLUMN_WIDTH):
            gr.Markdown("**Words** of an answer")
            answer = gr.Dropdown([], label="Answer", elem_id="answer")
            word = gr.Radio([], label="Word", elem_id="word", elem_classes="words")
        with gr.Column(min_width=COLUMN_WIDTH):
            overlay = _shown_image("**Attention** of the word", "overlay")
    return Parts(session, image, query_len, overview, quarters, times, chat, question, reset, answer, word, overlay)


def _shown_image(title: str, name: str) -> gr.Image:
    gr.Markdown(title)
    return gr.Image(
        show_label=False,  # it would hide the image's corner
        alt_text=title.replace("*", ""),
        format="png",
        image_mode=None,
        interactive=False,
        buttons=["fullscreen"],
        height=IMAGE_HEIGHT,
        elem_id=name,
        elem_classes="picture",
    )


def _connect(handlers: Handlers, parts: Parts) -> None:
    model = {"concurrency_id": MODEL, "concurrency_limit": 1, "api_visibility": "private"}
    quick = {"queue": False, "api_visibility": "private"}
    conversation = [parts.session, parts.chat, parts.question, parts.times, parts.answer, parts.word, parts.overlay]
    # gradio would decode the image before its size is known, so it hands over the file
    tiles = [parts.overview, parts.quarters]
    parts.image.change(
        handlers.open_session,
        [parts.image],
        [*conversation, *tiles],
        preprocess=False,
        show_progress_on=tiles,
        **model,
    )
    asking = parts.question.submit(
        handlers.ask, [parts.question, parts.query_len, parts.session], conversation, show_progress="minimal", **model
    )
    # the browser cancels behind the event itself, which must not wait for the answer that it ends
    for stop, then in (
        (parts.question.stop, handlers.show),
        (parts.reset.click, handlers.reset),
        (parts.chat.clear, handlers.reset),
    ):
        stop(None, cancels=[asking], queue=False).then(then, [parts.session], conversation, **model)
    parts.answer.input(handlers.choose_answer, [parts.answer, parts.session], [parts.word, parts.overlay], **quick)
    parts.word.input(handlers.choose_word, [parts.word, parts.answer, parts.session], [parts.overlay], **model)
