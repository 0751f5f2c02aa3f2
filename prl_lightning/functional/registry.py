"""Registry: functions that a configuration picks by name."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Values by name. Built-in names are protected; users may register more.

    Args:
        field: the argument that takes the name; error messages start with it.
        built_in: the values of the package.
        how_to_register: the call that adds a name, for error messages; empty if there is none.

    Example:
        >>> colours = Registry("colour", {"red": 1}, "register_colour(name, value)")
        >>> colours.register("blue", 2)
        >>> colours["blue"], colours.names()
        (2, ['red', 'blue'])
        >>> colours["green"]
        Traceback (most recent call last):
        ValueError: colour='green': use one of red, blue, or add it: register_colour(name, value).
    """

    def __init__(self, field: str, built_in: dict[str, T], how_to_register: str = "") -> None:
        self.field = field
        self._built_in = built_in
        self._registered: dict[str, T] = {}
        self._hint = f", or add it: {how_to_register}" if how_to_register else ""

    def register(self, name: str, value: T) -> None:
        """Add a value under a new name, or replace one that a user registered.

        Replacing allows a notebook cell to run twice.

        Args:
            name: not a built-in one.
            value: what the name stands for.

        Raises:
            ValueError: the name is built in.
        """
        if name in self._built_in:
            raise ValueError(f"name={name!r}: this {self.field} is built in, use another name.")
        self._registered[name] = value

    def names(self) -> list[str]:
        """Return all names: the built-in ones first, then those of users."""
        return [*self._built_in, *self._registered]

    def error(self, name: str, field: str | None = None) -> str | None:
        """Return the error message for a name, or None if it exists.

        Args:
            name: what was asked for.
            field: what the message calls it instead of ``field`` of the registry.
        """
        if name in self.names():
            return None
        return f"{field or self.field}={name!r}: use one of {', '.join(self.names())}{self._hint}."

    def __getitem__(self, name: str) -> T:
        """Return the value of a name.

        Raises:
            ValueError: the name does not exist.
        """
        if error := self.error(name):
            raise ValueError(error)
        return {**self._built_in, **self._registered}[name]
