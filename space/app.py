"""The page of `fusion-hf demo` as a Space. The variable MODEL names a model of the Hub; the default is fusion-nano."""

import os

from fusion_hf.demo.demo_model import DemoModel
from fusion_hf.demo.page import build_page, launch_settings
from fusion_hf.inference import ChatModel

demo = build_page(DemoModel(ChatModel.load(os.environ.get("MODEL")), max_new_tokens=1024))

if __name__ == "__main__":
    demo.launch(**launch_settings())
