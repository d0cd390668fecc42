"""Errors that a user can cause. Every command prints such an error as one line and exits with code 2."""


class UserError(ValueError):
    """Base of all errors that a user caused and can fix: the message has the values and the way out."""

    shared = False
    """True if all processes of a host raise the error at once, so that one of them is enough to print it."""


class ConfigError(UserError):
    """Invalid config: an unknown preset, a value out of range, or values that contradict each other."""

    shared = True


class UnknownNameError(ConfigError):
    """A config has an option or kind that this version does not have: mistyped, or of another version."""


class DataError(UserError):
    """Invalid data source: missing, empty, damaged or of the wrong shape."""


class CheckpointError(UserError):
    """Unusable run directory or checkpoint: missing, damaged, or of another config."""


class DamagedError(CheckpointError):
    """A file of a run has other content than was written there."""


class UnreadableError(CheckpointError):
    """A file of a run cannot be read just now, e.g. for a permission or a failing disk. It need not be damaged."""


class OtherVersionError(CheckpointError):
    """A run or checkpoint that another version of gen_dist wrote, in a format that this one does not know."""


class TakenOverError(CheckpointError):
    """A later start of the same launch has claimed the run directory, since this process was presumed dead."""
