"""Errors that end a run with one sentence instead of a traceback."""


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
