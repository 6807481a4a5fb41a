"""The ways a command ends early, each one message and one exit code; none shows a traceback."""


class Stop(Exception):
    """A command cannot go on; str() is the message for the user."""

    exit_code = 1


class InputError(Stop):
    """Something the user gave cannot be used; the message says what, and what to do instead."""

    exit_code = 2


class Diverged(Stop):
    """The loss or the parameters stopped being finite."""


class Interrupted(Stop):
    """Ctrl-C or SIGTERM; the message says how to go on."""

    exit_code = 130
