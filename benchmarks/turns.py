"""Run benchmarks in turn, so that a drift of the machine meets all that is compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """One process each, round by round.

    Args:
        commands: script of this folder and its arguments; it prints one JSON line last, with the
            seconds of its "iterations".
        rounds: how often all of them run.

    Returns:
        What each printed, round by round.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for round_ in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(
                [sys.executable, *command], cwd=FOLDER, check=True, capture_output=True, text=True
            )
            result = json.loads(done.stdout.strip().splitlines()[-1])
            results[name].append(result)
            seconds = [round(s, 2) for s in result["iterations"]]
            print(f"round {round_ + 1}, {name}: {seconds}", file=sys.stderr, flush=True)
    return results
