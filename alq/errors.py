"""The error for input that a user can put right."""


class InputError(ValueError):
    """Bad input: the message is one line that names the flag, file or layer and the fix."""
