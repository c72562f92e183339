"""The one exception whose message is meant for the person at the terminal."""


class UserError(ValueError):
    """Bad input: the message names the file, key or rank, says what is wrong and what to do. No traceback is shown."""
