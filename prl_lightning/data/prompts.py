"""PromptDataModule: the prompts of each epoch and rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import ConcatDataset

from prl_lightning.data.difficulty import Difficulty
from prl_lightning.data.format import DataError, PromptFormat, ToolsOf
from prl_lightning.data.generated import GeneratedPrompts, problem_of
from prl_lightning.data.loader import RolloutLoader
from prl_lightning.data.messages import appended
from prl_lightning.data.prompt_set import PromptSet
from prl_lightning.data.rollouts import RolloutBuffer, share_of
from prl_lightning.data.sizes import EpochSizes
from prl_lightning.data.sources import Source
from prl_lightning.data.stream import EVAL, PromptStream, seed_of
from prl_lightning.environments import Environments
from prl_lightning.evaluation import Evaluation
from prl_lightning.models.loading import load_tokenizer
from prl_lightning.runs.progress import hide_library_bars
from prl_lightning.types import Prompt, PromptSource, Rollout


class PromptDataModule(LightningDataModule):
    """Stream the training prompts and hold the evaluation sets.

    A Lightning epoch is one iteration: the next ``prompts_per_epoch`` prompts are sampled
    ``group_size`` times each. The order depends only on the seed and the position, so a resumed run
    continues with the same prompts.

    Args:
        tokenizer: Hugging Face id or folder; the CLI sets it to the policy's.
        train: one or more sources of prompts, each a JSON, JSON-lines or Parquet file or
            ``owner/dataset[/name][:split]`` of the Hub, or a ``PromptSource`` such as
            ``ReasoningGym``; only ``fit`` needs it. A PromptSource leaves out the problems of the
            evaluation sets.
        evaluation: sets and settings of the evaluation; the CLI sets it from its own section.
        format: how a row becomes a prompt.
        prompts_per_epoch: over all ranks.
        group_size: completions per training prompt.
        updates_per_epoch: optimizer updates per epoch.
        max_prompt_tokens: longer prompts are dropped and counted.
        micro_batch_tokens: cut an update into fewer micro-batches than the Trainer's
            ``accumulate_grad_batches``, as long as none has more tokens than this. A prompt counts
            once for its group. By default their number is always the same.
        seed: of the order of the prompts and of the sampling.
        prepare: called once per node before any prompt is read, to create or download the data.
        difficulty: draw prompts less often that are always solved, from the next pass over the
            data on.
        environments: environments and tools that the model acts in, also in the evaluation.

    Raises:
        ValueError: ``micro_batch_tokens`` is below 1.

    Attributes:
        reward_columns: columns that reward functions can read, by the field and path of each source
            that was read.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | PromptSource | list[str | PromptSource] | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008  (frozen)
        format: PromptFormat = PromptFormat(),  # noqa: B008  (frozen)
        prompts_per_epoch: int = 128,
        group_size: int = 8,
        updates_per_epoch: int = 1,
        max_prompt_tokens: int = 1024,
        micro_batch_tokens: int | None = None,
        seed: int = 0,
        prepare: Callable[[], Any] | None = None,
        difficulty: Difficulty | None = None,
        environments: Environments | None = None,
    ) -> None:
        super().__init__()
        if micro_batch_tokens is not None and micro_batch_tokens < 1:
            raise ValueError(
                f"data.micro_batch_tokens={micro_batch_tokens}: must be at least 1, or null."
            )
        trains = [train] if isinstance(train, str | PromptSource) else train or []
        self.train_sources = [_parse(source) for source in trains]
        self.evaluation = evaluation
        self.eval_sources = {name: _parse(source) for name, source in evaluation.sets.items()}
        self.tokenizer_name = tokenizer
        self.format = format
        self.prompts_per_epoch = prompts_per_epoch
        self.group_size = group_size
        self.updates_per_epoch = updates_per_epoch
        self.max_prompt_tokens = max_prompt_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.prepare = prepare
        self.difficulty = difficulty
        self.environments = environments
        self.prompts_seen = 0
        self._stream = PromptStream([], seed)
        self.train_buffer = RolloutBuffer(0)
        self.eval_buffers: dict[str, RolloutBuffer] = {}
        self.eval_prompts: dict[str, list[Prompt]] = {}  # of this rank
        self.reward_columns: dict[str, set[str]] = {}

    def prepare_data(self) -> None:
        """Create or download the data, once per node."""
        if self.prepare is not None:
            self.prepare()

    def setup(self, stage: str) -> None:
        """Read the prompts and size the buffers."""
        hide_library_bars()
        self.reward_columns = {}
        for source in self.sources(stage == "fit"):
            source.check()
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        if self.environments is not None:
            self.environments.check(self.tokenizer, self.format.chat_template_args)
        held_out: set[str] = set()
        for name, source in self.eval_sources.items():
            read = self._prompt_set(source, f"evaluation.sets.{name}")
            prompts = read.distinct() if isinstance(read, GeneratedPrompts) else read
            self.eval_prompts[name] = self._share_of(name, prompts)
            self.eval_buffers[name] = RolloutBuffer(num_updates=len(self.eval_prompts[name]))
            if self._generating:
                held_out.update(problem_of(prompts[row]) for row in range(len(prompts)))
        if stage == "fit":
            self._setup_train(held_out)

    def sources(self, trains: bool) -> list[Source | PromptSource]:
        """Return the sources of the evaluation, and of the training if ``trains``."""
        return [*(self.train_sources if trains else []), *self.eval_sources.values()]

    def _share_of(self, name: str, prompts: PromptSet | list[Prompt]) -> list[Prompt]:
        """Return this rank's prompts of an evaluation set, the same number on every rank.

        All ranks must take the same number of steps, so the last prompt is repeated as padding.
        """
        last = len(prompts) - 1
        rows = range(self.rank, last + self.ranks, self.ranks)[: last // self.ranks + 1]
        seeds = [seed_of(self.seed, EVAL, row, *name.encode()) for row in rows]
        return [
            replace(prompts[min(row, last)], seed=seed, is_padding=row > last)
            for row, seed in zip(rows, seeds, strict=True)
        ]

    def _setup_train(self, held_out: set[str]) -> None:
        if not self.train_sources:
            raise ValueError("data.train is missing: name the prompts to train on.")
        sets = [self._prompt_set(source, "data.train", held_out) for source in self.train_sources]
        prompts: ConcatDataset[Prompt] = ConcatDataset(sets)
        if len(prompts) < self.prompts_per_epoch:
            raise DataError(
                f"data.prompts_per_epoch={self.prompts_per_epoch}, but data.train has "
                f"{len(prompts)} prompts. Lower it, or add prompts."
            )
        self._stream = PromptStream(prompts, self.seed, self.difficulty)
        sizes = self.sizes(self.trainer)
        rank_zero_info(f"Epoch: {sizes}")
        self.train_buffer = RolloutBuffer(
            self.updates_per_epoch, sizes.micro_batches, self.micro_batch_tokens
        )

    def sizes(self, trainer: Trainer | None) -> EpochSizes:
        """Return how an epoch is cut.

        Args:
            trainer: has the number of ranks and of micro-batches; None means one of each.

        Raises:
            ValueError: one size is not a multiple of another.
        """
        ranks = 1 if trainer is None else trainer.world_size
        accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        return EpochSizes(
            self.prompts_per_epoch, self.group_size, self.updates_per_epoch, ranks, accumulate
        )

    def _prompt_set(
        self, source: Source | PromptSource, where: str, excluded: Collection[str] = ()
    ) -> PromptSet | GeneratedPrompts:
        rest = self.format, self.tokenizer, self.max_prompt_tokens, where, self._tools_of
        prompts = (
            GeneratedPrompts(source, *rest, excluded)
            if isinstance(source, PromptSource)
            else PromptSet(source, *rest)
        )
        self.reward_columns[prompts.where] = prompts.columns
        return prompts

    @property
    def _tools_of(self) -> ToolsOf | None:
        return None if self.environments is None else self.environments.schemas

    def with_text(self, prompt: Prompt, text: str) -> Prompt:
        """Return a prompt with a text at its end: of a chat, at the end of the user's last message.

        Args:
            prompt: of this data.
            text: what its environment says at the start; may be empty.
        """
        if not text:
            return prompt
        source = appended(prompt.source, text)
        tools = self._tools_of and self._tools_of(prompt.columns)
        token_ids = self.format.render(source, self.tokenizer, tools)
        return replace(prompt, source=source, token_ids=token_ids)

    @property
    def rank(self) -> int:
        """Index of this process among those that share an update."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def ranks(self) -> int:
        """Number of processes that share an update."""
        return 1 if self.trainer is None else self.trainer.world_size

    def next_prompts(self, ahead: int = 0) -> list[Prompt]:
        """Return this rank's prompts of the next epoch, update by update.

        Args:
            ahead: skip so many epochs. The prompts are final only if they depend on no results.
        """
        positions = self.positions(ahead + 1)[-self.prompts_per_epoch :]
        shares = share_of(positions, self.updates_per_epoch, self.ranks)
        return self.prompts_at(shares[self.rank])

    def positions(self, attempts: int = 1) -> list[int]:
        """Return the positions in the stream of the next ``attempts`` epochs' prompts."""
        return self._stream.positions(self.prompts_seen, attempts * self.prompts_per_epoch)

    def prompts_at(self, positions: Sequence[int]) -> list[Prompt]:
        """Return the prompts at positions of the stream."""
        return [self._stream[position] for position in positions]

    def advance(
        self, rollouts: Sequence[Rollout] = (), position: int | None = None
    ) -> dict[str, float]:
        """Move to the next epoch's prompts; a collective.

        Args:
            rollouts: this rank's of this epoch, which the sources may follow, as a curriculum does.
            position: in the stream, of the next epoch's first prompt; by default this epoch has
                taken ``prompts_per_epoch`` prompts.

        Returns:
            Values to log.
        """
        self.prompts_seen = self.positions()[-1] + 1 if position is None else position
        solved_at = self.evaluation.solved_at
        values = self._stream.observe(rollouts, self.group_size, solved_at)
        for source in self._generating:
            values |= source.observe(rollouts)
        return values

    @property
    def _generating(self) -> list[PromptSource]:
        return [source for source in self.train_sources if isinstance(source, PromptSource)]

    def train_dataloader(self) -> RolloutLoader:
        """Return a loader of micro-batches; the callback fills the buffer before it is read."""
        return RolloutLoader(self.train_buffer, self.rank, self.ranks)

    def val_dataloader(self) -> Sequence[RolloutLoader]:
        """Return one loader per evaluation set; each batch is the group of one prompt."""
        return [RolloutLoader(buffer) for buffer in self.eval_buffers.values()]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream of prompts, and the states of stream and sources."""
        states = [source.state_dict() for source in self._generating]
        return {"prompts_seen": self.prompts_seen, "sources": states} | self._stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved position."""
        self.prompts_seen = state_dict["prompts_seen"]
        # The numbers may differ: the run may continue with other sources.
        for source, state in zip(self._generating, state_dict.get("sources", []), strict=False):
            source.load_state_dict(state)
        self._stream.load_state_dict(state_dict)


def _parse(source: str | PromptSource) -> Source | PromptSource:
    return Source.parse(source) if isinstance(source, str) else source
