"""Imports inside a call, and what the import of a reward function's module has started."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.rewards import RewardLimits, RewardSum

pytestmark = pytest.mark.process

QUICK = RewardLimits(seconds=0.3, memory_mib=2048, failure_value=-1.0, workers=2)

Module = Callable[[str, str], None]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Write a module that reward functions can import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name, text: (tmp_path / f"{name}.py").write_text(text) and None


def needs(completions: list[str], **columns: Any) -> list[float]:
    """Import what a completion names, by a statement or by a call."""
    for text in completions:
        how, name = text.split()
        if how == "statement":
            exec(f"import {name}")
        else:
            importlib.import_module(name)
    return [1.0 for _ in completions]


SLOW = {
    "waits": "import time; time.sleep(1)",
    "computes": "from time import process_time as now\nend = now() + 0.6\nwhile now() < end: pass",
    "nested": "import waits, computes",
}


def test_an_import_in_a_call_does_not_count(scored: Any, module: Module) -> None:
    for name, text in SLOW.items():
        module(name, text)
    texts = ["call computes", "call waits", "statement nested", "statement json"]
    assert scored(texts, needs, QUICK).total.tolist() == [1.0] * 4


def test_imports_have_a_limit_of_their_own(module: Module) -> None:
    module("endless", "import time; time.sleep(1000)")
    limits = RewardLimits(seconds=60.0, import_seconds=0.5, workers=1)
    rewards = RewardSum([needs], limits=limits)
    rewards.start()
    assert rewards._sandbox is not None
    rewards._sandbox.limits = RewardLimits()  # loading may take longer on a busy machine
    with pytest.raises(RuntimeError, match=r"imports.*limits\.import_seconds=0\.5"):
        rewards.score(["?"] * 1000, ["statement endless"] * 1000, {})


class Unloading:
    def __call__(self, completions: Any) -> list[float]:
        return []

    def warm_up(self) -> None:
        importlib.import_module("endless")


def test_so_has_loading(scored: Any, module: Module) -> None:
    module("endless", "import time; time.sleep(1000)")
    limits = RewardLimits(seconds=60.0, import_seconds=0.5, workers=1)
    with pytest.raises(RuntimeError, match=r"not loaded.*limits\.import_seconds=0\.5"):
        scored(["a"], Unloading(), limits)


STARTED = {
    "a thread pool": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
list(pool.map(abs, [1, 2]))
def reward(completions):
    return list(pool.map(len, completions))
""",
    "an event loop": """
import asyncio, threading
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
async def length(text):
    return len(text)
def reward(completions):
    return [asyncio.run_coroutine_threadsafe(length(c), loop).result() for c in completions]
""",
    "a loop without a thread": """
import asyncio, time
loop = asyncio.new_event_loop()
def reward(completions):
    time.sleep(1000)
""",
}


@pytest.mark.parametrize("what", STARTED)
def test_a_call_that_waits_for_what_an_import_has_started_says_so(
    what: str, scored: Any, module: Module
) -> None:
    name = f"starts_{list(STARTED).index(what)}"
    module(name, STARTED[what])
    scores = scored(["a", "ab", "abc"], importlib.import_module(name).reward, QUICK)
    assert scores.total.tolist() == [-1.0] * 3
    for call in scores.failed_calls:
        assert call.failure.kind == "time"
        assert "fork" in call.failure.message
        assert ("event loop" if "loop" in what else "threads") in call.failure.message


def test_other_timeouts_do_not_mention_threads(scored: Any) -> None:
    (call,) = scored(["sleep"]).failed_calls
    assert "fork" not in call.failure.message


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_module_that_computes_with_torch_on_import(
    variable: str, scored: Any, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of the import would be missing in the workers."""
    monkeypatch.setenv(variable, "2")
    module(
        "computing",
        """
import torch
weights = torch.ones(400, 400) @ torch.ones(400, 400)
def reward(completions):
    return [float((weights @ weights)[0, 0] > 0) for _ in completions]
""",
    )
    reward = importlib.import_module("computing").reward
    limits = RewardLimits(seconds=3.0, memory_mib=2048, failure_value=-1.0, workers=2)
    assert scored(["a"] * 4, reward, limits).total.tolist() == [1.0] * 4
