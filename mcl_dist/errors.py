"""Errors that a person caused or can mend, each told in one line with a documented exit code."""

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # after saving what there was: the same command goes on from there


class UserError(Exception):
    """Something outside the program is wrong: the line says which file, what, and what to do.

    The command line prints the message alone, without a traceback, and leaves with `exit_code`.
    """

    exit_code = EXIT_FAILURE


class ConfigError(UserError):
    """A configuration or command line that cannot be used."""

    exit_code = EXIT_USAGE


class RankError(UserError):
    """What one rank alone met, and so has to tell; other errors all ranks meet, and the first tells."""
