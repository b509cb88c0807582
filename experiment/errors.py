"""What goes wrong at run time through no bug of ours: told in one line, without a traceback."""


class RunError(RuntimeError):
    """A run that cannot go on; the message says what, where, and what to do."""
