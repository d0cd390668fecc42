"""The file of `--out`: refused before minutes of measuring where it cannot be written."""

import os
from pathlib import Path

from gen_dist.errors import ConfigError


def check_out(file: Path | None) -> None:
    """Refuse a file that could not be written.

    Raises:
        ConfigError: its directory is missing, it is a directory itself, or it may not be written.
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
    """Print first: what was measured is then seen, though the disk be full.

    Raises:
        ConfigError: the file cannot be written any more.
    """
    print(text, flush=True)
    if file is None:
        return
    try:
        file.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
