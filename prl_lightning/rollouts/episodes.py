"""Episodes: completions of several turns, between which environments answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prl_lightning.data import PromptDataModule
from prl_lightning.data.stream import seed_of
from prl_lightning.distributed import max_over_ranks
from prl_lightning.environments.formats import ToolCall, told, turn_message
from prl_lightning.rewards.sandbox.client import Sandbox
from prl_lightning.rewards.sandbox.limits import Failure, Reply, Task
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.sampling import Progress, SamplingConfig
from prl_lightning.sampling.sample_cache import prompt_key
from prl_lightning.types import Completion, Prompt

Generate = Callable[[list[Prompt], SamplingConfig, Progress | None], list[list[Completion]]]


@dataclass
class Episode:
    """A completion that is under way.

    Attributes:
        prompt: with the text of the environment's ``reset``.
        seed: of its first turn; that of a later turn follows from it.
        state: of the environment; empty if there is none.
        completion: all turns so far; ``finished`` is that of the last turn, and in the end whether
            the episode ended by itself.
        calls: of the last turn.
        is_over: whether there is no further turn.
    """

    prompt: Prompt
    seed: int
    state: str
    completion: Completion
    calls: list[ToolCall] = field(default_factory=list)
    is_over: bool = False

    def add(self, turn: Completion) -> None:
        """Append a sampled turn."""
        self.completion = replace(
            self.completion,
            token_ids=self.completion.token_ids + turn.token_ids,
            logprobs=self.completion.logprobs + turn.logprobs,
            is_sampled=self.completion.is_sampled + turn.is_sampled,
            finished=turn.finished,
        )

    def say(self, token_ids: list[int]) -> None:
        """Append what the environment wrote."""
        size = len(token_ids)
        self.add(Completion(token_ids, [0.0] * size, True, [False] * size))

    def end(self, finished: bool, failure: Failure | None = None) -> None:
        """Allow no further turn."""
        what = "" if failure is None else f"{failure.kind}: {failure.message}"
        self.completion = replace(self.completion, finished=finished, failure=what)
        self.is_over = True

    def next_prompt(self, turn: int) -> Prompt:
        """Return what the engine continues in a turn: the same tokens, never tokenised again."""
        token_ids = self.prompt.token_ids + self.completion.token_ids
        return replace(self.prompt, token_ids=token_ids, seed=seed_of(self.seed, turn))


class Episodes:
    """Sample episodes: all that are under way take their next turn in one call of the engine.

    Args:
        data: has the environments, the tokenizer and the format of the prompts.
        settings: have the limits of an episode and of an environment's call.
        ranks: number of ranks on this machine, which share its cores.

    Raises:
        TypeError: an environment or a tool cannot be sent to another process.
    """

    def __init__(self, data: PromptDataModule, settings: RolloutSettings, ranks: int = 1) -> None:
        assert data.environments is not None
        self.data = data
        self.settings = data.environments
        self.limits = settings.limits
        self.max_new_tokens = settings.max_new_tokens
        self.turn_tokens = self.settings.tokens_of_turn(settings.max_new_tokens)
        # Ranks that share an engine must call it equally often.
        self._in_step = settings.sampler.ranks_per_engine > 1
        workers = self.limits.processes(ranks)
        self._sandbox = Sandbox([self.settings.host()], self.limits, workers, "environments")
        self._sandbox.start()
        self._opened: dict[str, Reply] = {}

    def stop(self) -> None:
        """Stop the environments' processes."""
        self._sandbox.stop()

    def open(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Reset an environment for each group, and append its text to the prompt.

        The completions of a group share their prompt, so they start from the same environment.

        Returns:
            The prompts of ``sample``.
        """
        replies = self._run(self._opening(prompts)) if self.settings.factories else []
        self._opened = {}
        opened = []
        for prompt, reply in zip(prompts, replies or [Reply()] * len(prompts), strict=True):
            values = reply.values or {}
            opened.append(self.data.with_text(prompt, self._cut(values.get("text", ""))))
            self._opened[prompt_key(opened[-1])] = reply
        return opened

    def sample(
        self,
        generate: Generate,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        on_progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Sample ``config.n`` episodes per prompt.

        Args:
            generate: samples one turn.
            prompts: of the last ``open``.
            config: of whole episodes.
            on_progress: see ``Sampler.generate``.

        Returns:
            The completions of each prompt. Their first and last tokens are sampled.
        """
        stops = (*config.stop_texts, *self.settings.format.stop_texts)
        turn = replace(config, max_new_tokens=self.turn_tokens, stop_texts=stops)
        tell = None if on_progress is None else lambda _, tokens: on_progress({}, tokens)
        groups = [
            self._begun(prompt, completions)
            for prompt, completions in zip(
                prompts, generate(list(prompts), turn, tell), strict=True
            )
        ]
        under_way = [episode for group in groups for episode in group]
        reported: set[int] = set()
        for number in range(1, self.settings.max_turns + 1):
            self._answer([one for one in under_way if not one.is_over], number, config)
            if on_progress is not None:
                done = {i for i, group in enumerate(groups) if all(one.is_over for one in group)}
                on_progress({i: _completions(groups[i]) for i in sorted(done - reported)}, 0)
                reported |= done
            under_way = [episode for episode in under_way if not episode.is_over]
            if not (max_over_ranks(len(under_way)) if self._in_step else under_way):
                break
            asked = [episode.next_prompt(number) for episode in under_way]
            for episode, (next_turn,) in zip(
                under_way, generate(asked, replace(turn, n=1), tell), strict=True
            ):
                episode.add(next_turn)
        return [_completions(group) for group in groups]

    def _begun(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Episode]:
        reply = self._opened[prompt_key(prompt)]
        state = (reply.values or {}).get("state", "")
        episodes = [
            Episode(prompt, prompt.seed + number, state, completion)
            for number, completion in enumerate(completions)
        ]
        if reply.failure is not None:
            for episode in episodes:
                episode.end(False, reply.failure)
        return episodes

    def _answer(self, episodes: Sequence[Episode], turn: int, config: SamplingConfig) -> None:
        """Make the calls of the episodes' last turns, and append the results or end the episode."""
        for episode in episodes:
            self._read(episode, config)
        calling = [episode for episode in episodes if episode.calls]
        for episode, reply in zip(calling, self._run(map(self._calling, calling)), strict=True):
            if reply.failure is not None:
                episode.end(False, reply.failure)
                continue
            episode.state = reply.values["state"]
            results = [self._cut(text) for text, _ in reply.values["results"]]
            self._note(episode, results, sum(is_error for _, is_error in reply.values["results"]))
            said = self._token_ids(self._reply(episode.calls, results))
            left = self.max_new_tokens - episode.completion.length - len(said)
            if reply.values["done"]:
                episode.end(True)
            elif turn == self.settings.max_turns or left < self.turn_tokens:
                episode.end(False)
            else:
                episode.say(said)
        self._reward([episode for episode in episodes if episode.is_over and episode.state])

    def _reply(self, calls: Sequence[ToolCall], results: Sequence[str]) -> str:
        template_args = self.data.format.chat_template_args
        return self.settings.format.reply(calls, results, self.data.tokenizer, template_args)

    def _read(self, episode: Episode, config: SamplingConfig) -> None:
        """Find the calls of the last turn; a turn without any, or a cut one, is the last."""
        completion = episode.completion
        start = len(completion.token_ids)
        while start and completion.is_sampled[start - 1]:
            start -= 1
        ids = completion.token_ids[start:]
        if ids[-1] in config.stop_token_ids:
            ids = ids[:-1]
        text = self.data.tokenizer.decode(ids)
        episode.calls = (
            self.settings.format.parse(text, self.data.tokenizer) if completion.finished else []
        )
        if not episode.calls:
            episode.end(completion.finished)
        messages = [*episode.completion.messages, turn_message(text, episode.calls)]
        episode.completion = replace(episode.completion, messages=messages)

    def _note(self, episode: Episode, results: Sequence[str], errors: int) -> None:
        episode.completion = replace(
            episode.completion,
            messages=episode.completion.messages + told(episode.calls, results),
            call_errors=episode.completion.call_errors + errors,
        )

    def _reward(self, episodes: Sequence[Episode]) -> None:
        """Ask the environments of episodes that are over for their rewards."""
        asking = [episode for episode in episodes if not episode.completion.failure]
        tasks = (self._task("reward", {"state": episode.state}, episode.seed) for episode in asking)
        for episode, reply in zip(asking, self._run(tasks), strict=True):
            if reply.failure is not None:
                episode.end(False, reply.failure)
            episode.completion = replace(episode.completion, environment_reward=reply.values)

    def _opening(self, prompts: Sequence[Prompt]) -> Iterable[Task]:
        for prompt in prompts:
            row = {"prompt": prompt.source, **prompt.columns}
            arguments = {"name": self.settings.name_of(prompt.columns), "row": row}
            yield self._task("open", arguments, prompt.seed)

    def _calling(self, episode: Episode) -> Task:
        calls = [(call.name, call.arguments, call.error) for call in episode.calls]
        seed = seed_of(episode.seed, episode.completion.length)
        arguments = {"state": episode.state, "calls": calls}
        return self._task("call", arguments, seed, len(calls))

    def _task(self, method: str, arguments: dict[str, Any], seed: int, calls: int = 1) -> Task:
        # numpy takes seeds of 32 bits.
        return Task(0, method, arguments, self.limits.seconds * calls, seed % 2**32)

    def _run(self, tasks: Iterable[Task]) -> list[Reply]:
        listed = list(tasks)
        return self._sandbox.run(listed) if listed else []

    def _cut(self, text: str) -> str:
        """Return a text of at most ``result_tokens`` tokens."""
        ids = self._token_ids(text)
        limit = self.settings.result_tokens
        return text if len(ids) <= limit else self.data.tokenizer.decode(ids[:limit])

    def _token_ids(self, text: str) -> list[int]:
        return list(self.data.tokenizer(text, add_special_tokens=False)["input_ids"])


def _completions(group: Sequence[Episode]) -> list[Completion]:
    return [episode.completion for episode in group]
