"""Errors that are a person's to mend: shown as one message, without a traceback, with exit code 1."""


class CosoError(Exception):
    """What is wrong, where, and what to do, in words; the CLI prints it and exits with code 1."""


class DeadlineExceeded(CosoError):
    """Something that was waited for did not happen in time; the message names it and the deadline."""
