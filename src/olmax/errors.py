"""Errors that the user can mend."""


class UserError(ValueError):
    """Bad input: the message says in one line what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2. Library callers
    see an ordinary `ValueError`.
    """
