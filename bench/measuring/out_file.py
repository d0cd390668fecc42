"""File of `--out`, refused before minutes of measuring if it cannot be written."""

import os
from pathlib import Path

from gen_dist.errors import ConfigError


def check_out(file: Path | None) -> None:
    """Refuse a file that could not be written.

    Raises:
        ConfigError: the directory is missing, the file is a directory, or permission is denied.
    """
    if file is None:
        return
    if file.is_dir():
        raise ConfigError(f"{file} cannot be written: it is a directory")
    if not file.resolve().parent.is_dir():
        raise ConfigError(f"{file} cannot be written: its directory is missing")
    if not os.access(file if file.exists() else file.resolve().parent, os.W_OK):
        raise ConfigError(f"{file} cannot be written: permission denied")


def print_and_write(text: str, file: Path | None) -> None:
    """Print the figures, then write them: they are seen even if the disk is full.

    Raises:
        ConfigError: the file can no longer be written.
    """
    print(text, flush=True)
    if file is None:
        return
    try:
        file.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
