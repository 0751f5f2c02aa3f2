"""A reward that compares answers, in a module that a worker imports fast."""

from __future__ import annotations

from typing import Any


class LetterVotes:
    """Answers are letters; "bad" gets no reward, and groups with "tie" are not compared."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        if "bad" in completions:
            raise KeyError("bad")
        return [1.0 for _ in completions]

    def answers(self, completions: list[str]) -> list[int]:
        if len(completions) > 1 and {"bad", "tie"} & set(completions):
            raise LookupError("no comparison")
        return [ord(text[0]) if text else -1 for text in completions]
