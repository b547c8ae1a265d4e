"""The error of whoever uses a model: says in one line what is wrong and what to do. Imports nothing."""


class InputError(ValueError):
    """Something about the given picture, question, model or setting that its giver can mend."""
