"""The one kind of error that conversion raises for what a user can mend."""


class ConversionError(Exception):
    """Says in one line what is wrong with the input and what to do."""
