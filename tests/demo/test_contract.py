"""What the page needs of gradio that another release may drop or rename: if one does, this says what."""

import inspect

import pytest

pytestmark = pytest.mark.demo

EVENT_ARGUMENTS = {
    "api_visibility",
    "cancels",
    "concurrency_id",
    "concurrency_limit",
    "preprocess",
    "queue",
    "show_progress",
    "show_progress_on",
}
QUEUE_ARGUMENTS = {"api_open", "default_concurrency_limit", "max_size"}


def arguments_of(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_launch_takes_all_settings():
    import gradio as gr

    from fusion_hf.demo.page import launch_settings

    assert launch_settings().keys() <= arguments_of(gr.Blocks.launch)
    assert arguments_of(gr.Blocks.queue) >= QUEUE_ARGUMENTS


@pytest.mark.parametrize(
    ("component", "event"), [("Image", "change"), ("Textbox", "submit"), ("Dropdown", "input"), ("Radio", "input")]
)
def test_events_take_the_arguments_of_the_page(component: str, event: str):
    import gradio as gr

    with gr.Blocks():
        listener = getattr(getattr(gr, component)(), event)
    assert arguments_of(listener) >= EVENT_ARGUMENTS


@pytest.mark.parametrize(("component", "event"), [("Textbox", "stop"), ("Button", "click"), ("Chatbot", "clear")])
def test_there_are_the_events_that_stop_an_answer(component: str, event: str):
    import gradio as gr

    with gr.Blocks():
        assert callable(getattr(getattr(gr, component)(), event))


def test_uploads_are_where_the_command_wants_them(tmp_path, monkeypatch: pytest.MonkeyPatch):
    import gradio as gr

    from fusion_hf.cli.demo import UPLOADS

    monkeypatch.setenv(UPLOADS, str(tmp_path))
    with gr.Blocks():
        assert str(tmp_path) == gr.Image().GRADIO_CACHE
