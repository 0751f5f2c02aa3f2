"""Make the folder that a run on the arithmetic problem starts from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from prl_lightning import __version__
from prl_lightning.arithmetic.problems import Problem, draw_problems
from prl_lightning.arithmetic.tokenizer import make_tokenizer


@dataclass(frozen=True)
class ArithmeticTask:
    """Problems and a base model in a folder: made once, then kept.

    The folder gets ``base/`` (a Hugging Face model and tokenizer), ``train.jsonl`` and
    ``heldout.jsonl`` (columns ``prompt`` and ``answer``; no problem is in both) and ``task.json``,
    written last: a folder with the same ``task.json`` is complete and is left as it is.

    Attributes:
        folder: where to.
        min_operations: of a problem.
        max_operations: of a problem.
        modulus: of the results.
        train_problems: number of them; the base model is trained on these alone.
        heldout_problems: number of them.
        error_rate: probability that a step of a trace of the base model's data is wrong.
        hidden_size: of the base model.
        layers: of the base model.
        base_steps: optimizer steps of the base model's training.
        seed: of problems and base model.
    """

    folder: str
    min_operations: int = 3
    max_operations: int = 5
    modulus: int = 10
    train_problems: int = 8192
    heldout_problems: int = 128
    error_rate: float = 0.25
    hidden_size: int = 128
    layers: int = 3
    base_steps: int = 400
    seed: int = 0

    def __call__(self) -> None:
        """Make what is missing, in a process of its own.

        Its own process, because it is a training run: it would otherwise leave its random state,
        its logging and its thread settings behind in the run that asked for it.
        """
        if self.is_made():
            return
        print(f"Training the base model of the arithmetic problem into {self.folder} (once).")
        launcher = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        subprocess.run(
            [sys.executable, "-m", "prl_lightning.arithmetic", json.dumps(asdict(self))],
            check=True,
            env={name: value for name, value in os.environ.items() if name not in launcher},
        )

    def is_made(self) -> bool:
        """Whether the folder is complete and was made with these settings and this version."""
        file = Path(self.folder) / "task.json"
        return file.is_file() and json.loads(file.read_text()) == self._settings()

    def make(self) -> None:
        """Train the base model and write the folder, in this process.

        Raises:
            FileExistsError: the folder holds something else, which would be lost.
            ValueError: there are not that many problems.
        """
        from prl_lightning.arithmetic.base_model import train_base_model

        folder = Path(self.folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "task.json").is_file():
            raise FileExistsError(
                f"folder={self.folder!r} holds something that is no arithmetic task. Name another "
                "folder, or empty this one."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        problems = draw_problems(self.min_operations, self.max_operations, self.seed, self.modulus)
        heldout = list(islice(problems, self.heldout_problems))
        train = list(islice(problems, self.train_problems))
        if len(train) < self.train_problems:
            raise ValueError(
                f"heldout_problems={self.heldout_problems} + train_problems={self.train_problems} "
                f"is more than the {len(heldout) + len(train)} problems of {self.min_operations} "
                f"to {self.max_operations} operations. Lower one, or raise max_operations."
            )
        tokenizer = make_tokenizer()
        model = train_base_model(
            train, tokenizer, self.error_rate, self.hidden_size, self.layers, self.base_steps,
            seed=self.seed,
        )  # fmt: skip
        # Beside, then renamed: an interrupted run leaves nothing that looks finished.
        with TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "task"
            model.save_pretrained(made / "base")
            tokenizer.save_pretrained(made / "base")
            write_rows(made / "train.jsonl", train)
            write_rows(made / "heldout.jsonl", heldout)
            (made / "task.json").write_text(json.dumps(self._settings(), indent=2))
            if folder.exists():
                folder.rename(Path(temporary) / "replaced")
            made.rename(folder)

    def _settings(self) -> dict[str, object]:
        settings = {name: value for name, value in asdict(self).items() if name != "folder"}
        return settings | {"version": __version__}


def write_rows(file: Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSON lines of ``prompt`` and ``answer``."""
    rows = ({"prompt": problem.prompt, "answer": problem.answer} for problem in problems)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
