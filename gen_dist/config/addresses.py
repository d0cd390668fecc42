"""Addresses of data, shown and recorded without secrets."""

from __future__ import annotations

import re

from gen_dist.errors import ConfigError

_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")
_SECRET = re.compile(r"sig|token|key|secret|passw|credential|auth|policy", re.IGNORECASE)
_QUERY = re.compile(r"\?[^\s]*")


def shown(address: str) -> str:
    """An address without login and query, which may hold a password or a signature."""
    return _QUERY.sub("?...", _LOGIN.sub("...@", address)) if "://" in address else address


def refuse_secrets(name: str, address: str) -> None:
    """Raise ConfigError if an address has a password or a signature in it: configs are recorded, and so are commands.

    Args:
        name: option that has the address.
        address: source or address, such as shards:https://host/a.tar.
    """
    query = _QUERY.search(address)
    if "://" not in address or not (_LOGIN.search(address) or (query and _SECRET.search(query[0]))):
        return
    raise ConfigError(
        f"{name} {shown(address)} has a password or signature in it, and a run records its options; give it in the "
        'environment, as in FSSPEC_HTTPS=\'{"headers": {"Authorization": "..."}}\', or in the files of its service'
    )
