"""The one kind of error that conversion raises for what a user can mend."""

from fusion_hf.common.errors import InputError


class ConversionError(InputError):
    """Says in one line what is wrong with the input and what to do. It may list tensors, and then lists all."""

    longest = 10**6
