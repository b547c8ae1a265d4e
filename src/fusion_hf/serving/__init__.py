"""The OpenAI-compatible server behind `fusion-hf serve`."""
