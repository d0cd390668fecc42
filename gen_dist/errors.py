"""What a user can do wrong. Every command prints such an error as one line and exits with code 2."""


class UserError(ValueError):
    """Base of all errors that a user caused and can mend: the message carries the values and the way out."""

    shared = False
    """Whether all processes of a host raise it at once, so that one of them is enough to tell of it."""


class ConfigError(UserError):
    """A config that cannot run: an unknown preset, a value out of range, values that do not go together."""

    shared = True


class DataError(UserError):
    """A data source that is missing, empty, damaged or of the wrong shape."""


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be used: missing, damaged, or of another config."""


class TakenOverError(CheckpointError):
    """The run directory belongs to a later start of the same launch: what raises it was thought dead."""
