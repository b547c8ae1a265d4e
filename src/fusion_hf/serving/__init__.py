"""A server with OpenAI's protocol: `fusion-hf serve`."""
