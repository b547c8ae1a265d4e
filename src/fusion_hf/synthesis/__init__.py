"""The data engine: captions to descriptions, images, questions and answers, filtered and written to train on."""
