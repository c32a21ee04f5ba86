"""End a run with one sentence instead of a traceback."""

import sys
from collections.abc import Callable, Sequence


class DriverError(Exception):
    """An error the user can act on; `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(DriverError):
    """A key or value of the configuration is wrong."""

    exit_code = 2


class DataError(DriverError):
    """The data set is not there."""

    exit_code = 2


class CheckpointError(DriverError):
    """A checkpoint or a result cannot be used."""

    exit_code = 2


class DivergedError(DriverError):
    """The loss is no longer finite."""


class VerificationError(DriverError):
    """The optimizer departs from the reference backend."""


class NumericsError(DriverError):
    """An eigensolver did not converge."""


class InUseError(CheckpointError):
    """Another process works in the folder."""


class StorageError(DriverError):
    """A file could not be written."""

    exit_code = 2


class TerminatedError(DriverError):
    """The process was told to end, by SIGTERM; what it did until then is saved.

    The exit code is that of sysexits' EX_TEMPFAIL: a queue may start the same command again.
    """

    exit_code = 75


def guarded(command: Callable[[Sequence[str]], int]) -> int:
    """Run a command; what the user can act on is one sentence on stderr, not a traceback."""
    try:
        return command(sys.argv[1:])
    except DriverError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}".removesuffix(": "), file=sys.stderr)
        return 130
