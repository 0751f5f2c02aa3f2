"""Keep keys, tokens and passwords of a configuration out of files."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

MASK = "***"
SECRET = re.compile(r"(^|_)(key|apikey|token|secret|password|passwd|authorization)$", re.IGNORECASE)
# Arguments of tokenizers, which are no secrets.
SPECIAL_TOKENS = re.compile(r"(eos|bos|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


class SaveConfig(SaveConfigCallback):
    """Lightning's SaveConfigCallback, with secrets masked."""

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(parser, masked(config), *args, **kwargs)


def masked(value: Any, name: str = "") -> Any:
    """Return a copy with ``***`` in place of secrets and of the credentials in addresses.

    Args:
        value: of a configuration.
        name: its key, which tells whether it is a secret.

    Example:
        >>> masked({"api_key": "s3", "tracking_uri": "https://me:s3@host/", "max_new_tokens": 8})
        {'api_key': '***', 'tracking_uri': 'https://***@host/', 'max_new_tokens': 8}
    """
    if isinstance(value, Namespace):
        copy = value.clone()
        for key, item in vars(value).items():
            copy[key] = masked(item, key)
        return copy
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(item, name) for item in value)
    if not isinstance(value, str):
        return value
    if SECRET.search(name) and not SPECIAL_TOKENS.search(name):
        return MASK
    return CREDENTIALS.sub(f"{MASK}@", value)
