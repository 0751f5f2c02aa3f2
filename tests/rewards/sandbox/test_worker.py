from __future__ import annotations

import traceback
import weakref
from typing import Any

import pytest

from prl_lightning.rewards.sandbox import worker

pytestmark = pytest.mark.process


def test_memory_that_an_error_holds_is_freed_before_it_is_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[weakref.ref[Any]] = []

    def fill() -> None:
        large = {1, 2, 3}
        kept.append(weakref.ref(large))
        raise MemoryError

    def shown(error: BaseException, limit: int) -> list[str]:
        assert kept[0]() is None
        return format_exception(error, limit=limit)

    format_exception = traceback.format_exception
    monkeypatch.setattr(traceback, "format_exception", shown)
    try:
        try:
            fill()
        except MemoryError as cause:
            raise RuntimeError("no room") from cause
    except RuntimeError as error:
        described = worker.describe(error)
    assert (described["kind"], described["message"]) == ("RuntimeError", "no room")
    assert "in fill" in described["traceback"]
