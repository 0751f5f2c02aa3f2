"""A configuration as objects, with every mistake at once; and as a file, without its secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

MASK = "***"
SECRET = re.compile(r"(^|_)(key|apikey|token|secret|password|passwd|authorization)$", re.IGNORECASE)
# Texts that a tokenizer has, and no secrets.
SPECIAL_TOKENS = re.compile(r"(eos|bos|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)
KEY = re.compile(r"""(?:key "|option ')([\w.]+)["']""")  # as jsonargparse names it
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


class Misread(Exception):
    """What the parser does not understand."""


class Parser(LightningArgumentParser):
    """Lightning's, which says what it does not understand and no pages of what it would."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise it.

        Raises:
            Misread: always.
        """
        raise Misread(message) from ex


def misread(read: Callable[[list[str]], Any], words: list[str]) -> list[str]:
    """Read a command line again and again, each time without what was not understood.

    Args:
        read: raises ``Misread`` for the first mistake that it finds.
        words: the command line.

    Returns:
        Every mistake: unknown keys and values of another type, in files and in the line itself.
    """
    found: list[str] = []
    while True:
        try:
            read(words)
        except Misread as error:
            said = str(error)
            is_missing = "are required" in said or said.endswith("Got value: None")
            rest = _without(words, said)
            if rest == words and not is_missing:  # it names no key
                own = _words_of(read, words, said)
                said = f"{' '.join(words[own])}: {said}" if words[own] else said
                rest = words[: own.start] + words[own.stop :]
            if not (found and is_missing):  # what has just been taken out
                found.append(said)
            if rest == words:
                return found
            words = rest
        else:
            return found


def _without(words: list[str], said: str) -> list[str]:
    """Take out what the parser has named."""
    unknown = said.removeprefix("unrecognized arguments: ")
    if unknown != said:
        return [w for w in words if w not in unknown.split() and not _is_option_in(w, unknown)]
    named = KEY.search(said)
    if named is None:
        return words
    key, rest, before = named[1], [], ""
    for word in words:
        is_value = before == f"--{key}" and word[:2] != "--"
        is_named = word == f"--{key}" or word.startswith(tuple(f"--{key}{end}" for end in "=.+"))
        if not (is_value or is_named):
            option = "--config=" if word.startswith("--config=") else ""
            is_file = option or before in ("--config", "-c")
            rest.append(option + _file_without(word[len(option) :], key) if is_file else word)
        before = word
    return rest


def _words_of(read: Callable[[list[str]], Any], words: list[str], said: str) -> slice:
    """The option that a message is of, and its value: none where that is a file."""
    for end in range(1, len(words) + 1):
        try:
            read(words[:end])
        except Misread as error:
            if str(error) == said:
                start = end - 1 if words[end - 1].startswith("--") else max(0, end - 2)
                is_file = re.match(r"(--config|-c)(=|$)", words[start])
                return slice(0, 0) if is_file else slice(start, end)
    return slice(0, 0)


def _is_option_in(word: str, unknown: str) -> bool:
    return word.startswith("--") and word in unknown


def _file_without(file: str, key: str) -> str:
    """A configuration as text where it has the key, and its name where it has not."""
    settings = yaml.safe_load(Path(file).read_text() if Path(file).is_file() else file)
    *path, last = key.split(".")
    section = settings
    for name in path:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        return file
    del section[last]
    return json.dumps(settings)


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
