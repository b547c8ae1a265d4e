"""`transformers serve`, as a process of its own, gives FUSION's answer or an error, never another answer."""

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tests.helpers.chat_models import chat, encode, load_chat_model
from tests.helpers.transformers_server import serve_transformers

from fusion_hf import nano_path

pytestmark = pytest.mark.synth  # its environment has transformers[serving]
ANSWER_SECONDS = 120
QUESTION = "what color is the sky?"
NEW_TOKENS = 8


def ask(url: str, model: str) -> tuple[int, str]:
    """Status and text of a chat completion."""
    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


TRUSTED, BATCHED = "--trust-remote-code", "--continuous-batching"


@pytest.mark.parametrize("options", [(TRUSTED,), (TRUSTED, BATCHED), (BATCHED,)], ids=" ".join)
@pytest.mark.parametrize("preloaded", [True, False], ids=["preloaded", "on demand"])
def test_an_answer_is_fusions_or_an_error(tmp_path: Path, options: tuple[str, ...], preloaded: bool) -> None:
    folder = Path(shutil.copytree(nano_path(), tmp_path / "model"))
    log = tmp_path / "log"
    with serve_transformers(*options, *([str(folder)] if preloaded else []), log=log) as (process, url):
        if process.poll() is not None:  # it did not start, and says so
            assert process.returncode != 0
            said = log.read_text(encoding="utf-8")
            assert "FusionForConditionalGeneration" in said or "trust_remote_code" in said
            return
        status, text = ask(url, str(folder))
    if status == 200:
        model, processor = load_chat_model(folder)
        inputs = encode(processor, chat(QUESTION, image=None))
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(written, skip_special_tokens=True)
        assert json.loads(text)["choices"][0]["message"]["content"].strip() == expected.strip()
    else:
        assert status >= 400
        assert "choices" not in text
