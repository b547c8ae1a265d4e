"""The data engine: it turns captions into descriptions, images, questions and answers, filters them and writes
training data.
"""
