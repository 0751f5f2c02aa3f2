"""A configuration as objects, with every mistake at once; and as a file, without its secrets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

MASK = "***"
SECRET = re.compile(r"(^|_)(key|apikey|token|secret|password|passwd|authorization)$", re.IGNORECASE)
# Texts that a tokenizer has, and no secrets.
SPECIAL_TOKENS = re.compile(r"(eos|bos|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


class Missing:
    """In the place of an object that could not be made."""


class Construction:
    """Makes objects, and goes on where one cannot be made.

    What is wrong with a dataclass keeps nothing from being made of its values; anything else that
    fails leaves a hole, and what would have it as a part is not made either.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.is_over = False

    def __call__(self, kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make an object, as jsonargparse asks for it.

        Args:
            kind: its class, or what makes it.
            args: of the class.
            kwargs: of the class.
        """
        if self.is_over:  # what is made by a factory when it is needed, such as an optimizer
            return kind(*args, **kwargs)
        if has_holes([args, kwargs]):
            return Missing()
        try:
            return kind(*args, **kwargs)
        except (ValueError, OSError, ImportError, MisconfigurationException) as error:
            self.errors.append(str(error))
            return _unchecked(kind, kwargs) if is_dataclass(kind) else Missing()


def has_holes(value: Any) -> bool:
    """Whether something in it could not be made.

    Args:
        value: an object, or dictionaries and lists of them.
    """
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(has_holes, value))
    return isinstance(value, Missing)


def _unchecked(kind: Any, values: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        object.__setattr__(made, field.name, values.get(field.name, default))
    return made


class SaveConfig(SaveConfigCallback):
    """Lightning's, but keys, tokens and passwords that a configuration has are not written down."""

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(parser, masked(config), *args, **kwargs)


def masked(value: Any, name: str = "") -> Any:
    """A copy with ``***`` for texts under a secret's name and for the credentials of addresses.

    Args:
        value: of a configuration.
        name: the key that it is under.

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
