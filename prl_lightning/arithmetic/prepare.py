"""Create the folders that runs on small problems start from: a base model, and rows of data."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

from prl_lightning import __version__
from prl_lightning.arithmetic.guessing import Game
from prl_lightning.arithmetic.problems import Problem, Traced, WithCalls, draw_problems
from prl_lightning.arithmetic.tokenizer import make_tokenizer
from prl_lightning.runs.progress import hide_library_bars


@dataclass(frozen=True)
class SmallTask(ABC):
    """Rows and a base model in a folder. It is created once and then reused.

    The folder has ``base/`` (a Hugging Face model and tokenizer), ``train.jsonl``,
    ``heldout.jsonl``, and ``task.json`` with the settings. A folder with the same ``task.json`` is
    complete and is reused.

    Attributes:
        folder: path to create.
        error_rate: probability that a step is wrong in the base model's training data.
        hidden_size: of the base model.
        layers: of the base model.
        base_steps: optimizer steps of the base model's training.
        seed: of rows and base model.
        base_batch_size: traces per step of that training.
        base_learning_rate: its maximum in that training.
    """

    folder: str
    error_rate: float = 0.25
    hidden_size: int = 128
    layers: int = 3
    base_steps: int = 400
    seed: int = 0
    base_batch_size: int = 128
    base_learning_rate: float = 2e-3

    @abstractmethod
    def draw(self) -> tuple[Sequence[Traced], Sequence[Traced]]:
        """Return what is trained on, also by the base model, and what is held out."""

    def __call__(self) -> None:
        """Create the folder unless it is complete; see ``make``."""
        if not self.is_made():
            print(f"Training the base model of {type(self).__name__} into {self.folder} (once).")
            self.make()

    def is_made(self) -> bool:
        """Whether the folder is complete, with these settings and this version."""
        file = Path(self.folder) / "task.json"
        return file.is_file() and json.loads(file.read_text()) == self._settings()

    def make(self) -> None:
        """Train the base model and write the folder; replace one with other settings.

        Raises:
            FileExistsError: the folder has other files, which would be lost.
            ValueError: there are fewer problems than asked for.
        """
        from prl_lightning.arithmetic.base_model import train_base_model

        hide_library_bars()
        folder = Path(self.folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "task.json").is_file():
            raise FileExistsError(
                f"folder={self.folder!r} has files of something else. Choose another folder, or "
                "empty this one."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        train, heldout = self.draw()
        tokenizer = make_tokenizer()
        model = train_base_model(
            train, tokenizer, self.error_rate, self.hidden_size, self.layers, self.base_steps,
            self.base_batch_size, self.base_learning_rate, self.seed,
        )  # fmt: skip
        # Written elsewhere and then renamed: an interrupted run leaves no incomplete folder.
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


@dataclass(frozen=True)
class ArithmeticTask(SmallTask):
    """Problems of left-to-right arithmetic; rows have ``prompt`` and ``answer``.

    No problem is both in ``train.jsonl`` and in ``heldout.jsonl``.

    Attributes:
        min_operations: per problem.
        max_operations: per problem.
        modulus: of the results.
        train_problems: their number; the base model is trained on these alone.
        heldout_problems: their number.
        call_rate: probability that the base model asks for the result of a step, see ``WithCalls``.
    """

    min_operations: int = 3
    max_operations: int = 5
    modulus: int = 10
    train_problems: int = 8192
    heldout_problems: int = 128
    call_rate: float = 0.0

    def draw(self) -> tuple[Sequence[Traced], Sequence[Traced]]:
        """See ``SmallTask.draw``; the problems are distinct."""
        problems = draw_problems(self.min_operations, self.max_operations, self.seed, self.modulus)
        heldout = list(islice(problems, self.heldout_problems))
        train = list(islice(problems, self.train_problems))
        if len(train) < self.train_problems:
            raise ValueError(
                f"heldout_problems={self.heldout_problems} + train_problems={self.train_problems} "
                f"is more than the {len(heldout) + len(train)} problems of {self.min_operations} "
                f"to {self.max_operations} operations. Lower one, or raise max_operations."
            )
        return [WithCalls(problem, self.call_rate) for problem in train], heldout


@dataclass(frozen=True)
class SumsTask(SmallTask):
    """Sums a+b-c whose results are digits, so that any model can solve them; made in seconds.

    The rows are as those of ``ArithmeticTask``. The notebooks use it.

    Attributes:
        heldout_problems: of the 385 sums; the others are trained on, also by the base model.
    """

    hidden_size: int = 64
    layers: int = 1
    base_steps: int = 600
    base_batch_size: int = 32
    base_learning_rate: float = 3e-3
    heldout_problems: int = 64

    def draw(self) -> tuple[Sequence[Traced], Sequence[Traced]]:
        """See ``SmallTask.draw``; the problems are distinct."""
        sums = [
            Problem((a, b, c), ("+", "-"))
            for a, b, c in product(range(10), repeat=3)
            if c <= a + b < 10
        ]
        random.Random(self.seed).shuffle(sums)
        return sums[self.heldout_problems :], sums[: self.heldout_problems]


@dataclass(frozen=True)
class GuessingTask(SmallTask):
    """Games of guessing a number; rows have ``prompt`` and ``secret``.

    All games look the same at first, so every number is trained on and held out.

    Attributes:
        games: rows of ``train.jsonl``.
    """

    error_rate: float = 0.6
    games: int = 1024

    def draw(self) -> tuple[Sequence[Traced], Sequence[Traced]]:
        """See ``SmallTask.draw``."""
        every = [Game(secret) for secret in range(1, Game.largest + 1)]
        return [every[number % len(every)] for number in range(self.games)], every


def write_rows(file: Path, problems: Iterable[Traced]) -> None:
    """Write the rows of problems as JSON lines."""
    file.write_text("".join(json.dumps(problem.row) + "\n" for problem in problems))
