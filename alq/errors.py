"""The errors that end a run in one line, and the exit code of each."""


class InputError(ValueError):
    """Bad input: the message is one line that names the flag, file or layer and the fix.

    Attributes:
        argument: name of the function's argument or `Schedule`'s number that was wrong, "fold"
            where folding is impossible, None where it was something else. The message begins with
            it; the scripts, whose flags have the same names, put the dashes before it.
    """

    code = 2

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class NotFinite(InputError):
    """A number of the training is NaN or infinite: the message names epoch, batch and layer."""

    code = 3
