"""`fusion-hf demo`: a page on which an image is shown to a model, asked about, and looked at as the model sees it."""
