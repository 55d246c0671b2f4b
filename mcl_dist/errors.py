"""Errors that a user caused or can fix: one line each, with a documented exit code."""

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # everything is saved: the same command resumes


class UserError(Exception):
    """A problem outside the program; the message is one line with the file or key, what was found and what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = EXIT_FAILURE


class ConfigError(UserError):
    """An invalid configuration or command line."""

    exit_code = EXIT_USAGE


class RankError(UserError):
    """An error of one rank, which that rank reports itself; the first rank reports errors that all ranks share."""
