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
from fusion_hf.drawing.drawn_images import MAX_COUNT, WORDS
from fusion_hf.hub.folders import nano_path

TITLE = "FUSION"
FUSION = (
    "[FUSION](https://arxiv.org/abs/2504.09925) is a family of vision-language models that read the question while "
    "they encode the image."
)
NANO = (
    "This page runs **fusion-nano**, a tiny demonstration model with {millions:.1f} million parameters. It was "
    "trained on small drawings: it can name colors, shapes and positions, count to {most}, and read {words} words. "
    "It cannot describe photos or chat: where it does not know the answer, it guesses."
)
OTHER = (
    "This page runs a model with {millions:,.0f} million parameters. Its answers can be wrong, so check what matters."
)
EXPLANATION = """## What the model sees
The model sees the whole image as an overview, and four tiles with more detail. Your question guides how it encodes the
overview."""
ATTENTION = (
    "Choose a word of an answer: bright areas are the parts of the image that the model attended to most when it "
    "wrote that word."
)
LATENT_TOKENS = (
    "Tokens per question that collect details from the four tiles. Your choice applies to the next question."
)
START = "Choose an example below or upload an image, and ask a question."
MAX_WAITING = 32  # calls in the queue
MAX_SESSIONS = 64  # the one that was used longest ago is forgotten
KEPT_SECONDS = 3600  # sessions and uploads
FORM_BYTES = 2**16  # what a form has beside its file
MODEL = "model"  # calls that share it come one after the other
IMAGE_HEIGHT, CHAT_HEIGHT = 260, 300  # pixels
HALF_A_PHONE, COLUMN_WIDTH = 140, 150  # pixels that columns have at least
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
SYSTEM_MONO_FONTS = ("ui-monospace", "Consolas", "Menlo", "monospace")
# Small images are enlarged, and a long answer's words do not fill the page.
CSS = """
.image img {object-fit: contain; width: 100%; height: 100%}
.words .wrap {max-height: 9rem; overflow-y: auto}
@media (max-width: 640px) {
  .shown {height: 45vw !important}
}
"""
# The pixels of an enlarged image have sharp edges. A reduced image would lose lines that way.
SHARP_IMAGES = """() => document.addEventListener("load", ({target}) => {
  if (!(target instanceof HTMLImageElement)) return;
  const scale = Math.min(target.clientWidth / target.naturalWidth, target.clientHeight / target.naturalHeight);
  target.style.imageRendering = scale > 1 ? "pixelated" : "auto";
}, true)"""


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
        "js": SHARP_IMAGES,
        "app_kwargs": {"middleware": [Middleware(RequestGuard, max_upload_bytes=MAX_UPLOAD_BYTES + FORM_BYTES)]},
    }


def describe_model(demo_model: DemoModel) -> str:
    """Describe in plain words which model answers, and what you can expect of it."""
    model = demo_model.chat_model.model
    text = NANO if model.name_or_path == nano_path() else OTHER
    return text.format(millions=model.num_parameters() / 1e6, most=MAX_COUNT, words=len(WORDS))


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
    gr.Markdown(f"# FUSION\n{FUSION} {describe_model(demo_model)}")
    with gr.Row(equal_height=True):
        with gr.Column(scale=2, min_width=HALF_A_PHONE):
            image = gr.Image(
                label="Image",
                format="png",
                sources=["upload", "clipboard"],
                height=CHAT_HEIGHT,
                elem_id="image",
                elem_classes="image",
            )
        with gr.Column(scale=3, min_width=HALF_A_PHONE):
            chat = gr.Chatbot(
                label="Conversation",
                placeholder=START,
                height=CHAT_HEIGHT,
                render_markdown=False,
                buttons=[],
                elem_id="chat",
            )
    question.render()
    with gr.Row():
        with gr.Column():
            examples = [list(example) for example in draw_examples()]
            gr.Examples(examples, [image, question], cache_examples=False)
        with gr.Column():
            reset = gr.Button("New conversation", size="sm", elem_id="reset")
            with gr.Accordion("Latent tokens and timings", open=False, elem_id="numbers"):
                query_len = gr.Radio(
                    demo_model.query_lens,
                    value=demo_model.budget.query_len,
                    label="Latent tokens (query_len)",
                    info=LATENT_TOKENS,
                    elem_id="query-len",
                )
                times = gr.Markdown(elem_id="times")
    gr.Markdown(EXPLANATION)
    with gr.Row():
        with gr.Column(min_width=COLUMN_WIDTH):
            overview = _shown_image("Overview", "overview")
        with gr.Column(min_width=COLUMN_WIDTH):
            quarters = _shown_image("Four tiles", "tiles")
    gr.Markdown(f"### Where the model looked\n{ATTENTION}")
    with gr.Row():
        with gr.Column(min_width=COLUMN_WIDTH):
            answer = gr.Dropdown([], label="Answer", elem_id="answer")
            word = gr.Radio([], label="Word", elem_id="word", elem_classes="words")
        with gr.Column(min_width=COLUMN_WIDTH):
            overlay = _shown_image("Attention", "overlay")
    return Parts(session, image, query_len, overview, quarters, times, chat, question, reset, answer, word, overlay)


def _shown_image(title: str, name: str) -> gr.Image:
    gr.Markdown(f"**{title}**")
    return gr.Image(
        show_label=False,  # it would hide the image's corner
        alt_text=title,
        format="png",
        image_mode=None,
        interactive=False,
        buttons=["fullscreen"],
        height=IMAGE_HEIGHT,
        elem_id=name,
        elem_classes=["image", "shown"],
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
