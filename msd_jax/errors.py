"""Errors that a user can mend: a command prints their message as one line, without a traceback."""


class UserError(ValueError):
    """Something the user gave does not fit: a setting, a flag, a file. The message names it and says what would do."""


class UserFileError(UserError, FileNotFoundError):
    """A file or directory that the user named is missing or cannot be written."""

    __str__ = Exception.__str__  # OSError's own looks for an errno
