"""The data engine: captions to descriptions, pictures, questions and answers, filtered and written to train on."""
