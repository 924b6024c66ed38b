"""Errors that the user can fix: shown as one message, without a traceback, with exit code 1."""


class CosoError(Exception):
    """An error that says what is wrong, where, and what to do. The CLI prints it and exits with code 1."""


class DeadlineExceeded(CosoError):
    """A wait reached its deadline. The message names what was waited for and the deadline."""
