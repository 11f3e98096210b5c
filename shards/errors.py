"""The one exception for input that a user can mend."""


class InputError(Exception):
    """Bad arguments, configuration or data.

    The message names the file, key or value and says what to do; the command line prints it without a
    traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)  # by keyword too: so torch makes again what a loader's worker raised

    @property
    def message(self) -> str:
        """The message alone: out of a loader's worker it comes wrapped in that worker's traceback."""
        return str(self).rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


class AccessError(InputError):
    """What is there cannot be reached now: too many open files, no permission, a device that fails.

    No damage: another try, another process or another node may read it, so nothing may take its place.
    """
