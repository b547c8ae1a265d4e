"""A visitor of the page: what a person does and sees in the browser."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

SECONDS = 20
WIDTH, HEIGHT = 1280, 1000


class Visitor:
    """Uses the page at an address in a browser tab of its own."""

    def __init__(self, page: Page, address: str):
        self.page = page
        self.addresses: list[str] = []
        page.set_default_timeout(SECONDS * 1000)
        expect.set_options(timeout=SECONDS * 1000)
        page.on("request", lambda request: self.addresses.append(request.url))
        page.goto(address)

    def show(self, file: Path) -> None:
        """Upload an image, and wait for its tiles."""
        remove = self.page.get_by_role("button", name="Remove Image")
        if remove.count():
            remove.click()
            expect(self.page.locator("#tiles img")).to_have_count(0)
        self.upload(file)
        expect(self.page.locator("#tiles img")).to_be_attached()

    def upload(self, file: Path) -> None:
        self.page.set_input_files("#image input[type=file]", file)

    def unfold(self, name: str) -> Locator:
        """Open a part of the page that is folded; the part."""
        part = self.page.locator(f"#{name}")
        part.locator("button").first.click()
        return part

    def choose_query_len(self, length: int) -> None:
        """Choose a number of latent tokens, in a part that is unfolded."""
        self.page.locator("#query-len").get_by_text(str(length), exact=True).click()

    def type(self, question: str) -> None:
        """Send a question without waiting for its answer."""
        box = self.page.get_by_label("Question", exact=True)
        box.fill(question)
        box.press("Enter")

    def ask(self, question: str) -> str:
        """The answer, when it is complete."""
        number = len(self.answers()) + 1
        self.type(question)
        # the list of answers follows when the last one is complete
        expect(self.page.get_by_label("Answer", exact=True)).to_have_value(re.compile(f"^{number}: "))
        expect(self.page.locator("#chat .bot.message")).to_have_count(number)
        return self.answers()[-1]

    def call_of(self, event: str) -> int:
        """Gradio's number of what the page does on an event."""
        calls = self.page.evaluate("window.gradio_config.dependencies")
        return next(call["id"] for call in calls if call["targets"] and call["targets"][0][1] == event)

    def answers(self) -> list[str]:
        return [text.strip() for text in self.page.locator("#chat .bot.message").all_inner_texts()]

    def words(self) -> list[str]:
        """That can be chosen."""
        return [text.strip() for text in self.page.locator("#word label").all_inner_texts()]

    def look_at(self, word: str) -> np.ndarray:
        """Choose a word of the answer; its overlay `(H, W, 3)`."""
        self.page.locator("#word label").get_by_text(word, exact=True).click()
        return self.image("overlay")

    def image(self, name: str) -> np.ndarray:
        """What an image of the page shows, `(H, W, 3)`."""
        image = self.page.locator(f"#{name} img")
        expect(image).to_be_attached()
        response = self.page.request.get(image.get_attribute("src") or "")
        return np.asarray(Image.open(BytesIO(response.body())).convert("RGB"))
