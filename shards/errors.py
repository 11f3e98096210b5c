"""The one exception for input that a user can mend."""


class InputError(Exception):
    """Bad arguments, configuration or data.

    The message names the file, key or value and says what to do; the command line prints it without a
    traceback and exits with code 2.
    """
