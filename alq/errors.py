"""The errors that end a run in one line, and the exit code of each."""


class InputError(ValueError):
    """Bad input: the message is one line that names the flag, file or layer and the fix."""

    code = 2


class NotFinite(InputError):
    """A number of the training is NaN or infinite: the message names epoch, batch and layer."""

    code = 3
