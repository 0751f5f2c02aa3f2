"""An iteration through Trainer.fit: sampling, scoring and one update. Prints one JSON line last.

    python benchmarks/bench_step.py --hidden 512 --layers 8 --heads 8 --prompts 8 \
        --max-new-tokens 128 --lengths lognormal
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.data import PromptDataModule
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.sampling import HFSampler, Progress, Sampler, SamplingConfig, VLLMSampler
from prl_lightning.sampling.vllm_internals import completion_of
from prl_lightning.types import Completion, Prompt
from work import Work, add_arguments, make, matmul_rate, reward, work_of

WARM_UP = 1


class VLLMOfLengths(VLLMSampler):
    """One request a completion, because a request has one limit; the prompt's cache is shared."""

    def __init__(self, work: Work, compiled: bool) -> None:
        super().__init__(cache_gib=0.5, enforce_eager=not compiled)
        self.lengths = work.lengths_of_epochs()

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        from vllm import SamplingParams

        lengths = next(self.lengths)
        rows = [(p, n) for p, group in zip(prompts, lengths, strict=True) for n in group]
        params = [
            SamplingParams(max_tokens=n, seed=i, ignore_eos=True, logprobs=0, detokenize=False)
            for i, (_, n) in enumerate(rows)
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt, _ in rows], params, use_tqdm=False
        )
        # Their lengths are given: each ends by itself where it is to end.
        drawn = iter(replace(completion_of(output.outputs[0]), finished=True) for output in outputs)
        return [[next(drawn) for _ in group] for group in lengths]


class HFOfLengths(HFSampler):
    """Rows are generated to the longest of their batch and then cut."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.no_token = work.vocab
        self.lengths = work.lengths_of_epochs()

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        lengths = next(self.lengths)
        never = replace(config, stop_token_ids=(self.no_token,))
        groups = super().generate(prompts, never, on_progress)
        return [
            [Completion(c.token_ids[:n], c.logprobs[:n], True) for c, n in zip(*pair, strict=True)]
            for pair in zip(groups, lengths, strict=True)
        ]


class Stopwatch(Callback):
    """Seconds of every iteration, of its sampling, and of the parts of its update.

    What the machine can do is measured anew before each update, because it shares its cores.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.sampling: list[float] = []
        self.peaks: list[float] = []
        self.parts: dict[str, list[float]] = {"reference": [], "forward": [], "backward": []}
        self._part = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()
        score = pl_module.score_references

        def timed_score(batch: Any) -> Any:
            start = time.perf_counter()
            logprobs = score(batch)
            self._add("reference", start)
            self._part += time.perf_counter() - start  # not also part of the forward pass
            return logprobs

        pl_module.score_references = timed_score  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for values in self.parts.values():
            values.append(0.0)
        start = time.perf_counter()
        self.peaks.append(matmul_rate())
        self._start += time.perf_counter() - start

    def on_train_batch_start(self, *_: Any) -> None:
        self._part = time.perf_counter()

    def on_before_backward(self, *_: Any) -> None:
        self._add("forward", self._part)
        self._part = time.perf_counter()

    def on_after_backward(self, *_: Any) -> None:
        self._add("backward", self._part)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.perf_counter()
        self.sampling.append(float(trainer.callback_metrics["rollout/sampling_seconds"]))
        self.seconds.append(now - self._start)
        self._start = now

    def _add(self, part: str, start: float) -> None:
        self.parts[part][-1] += time.perf_counter() - start


def run(work: Work, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    epochs = WARM_UP + args.iterations
    make(work, folder, epochs)
    sampler: Sampler = (
        HFOfLengths(work) if args.sampler == "hf" else VLLMOfLengths(work, args.compile_engine)
    )
    rollout = RolloutCallback([reward], sampler, max_new_tokens=work.max_new_tokens)
    model = str(folder / "model")
    module = PRLModule(model, Objective(beta=0.01), compile=args.compile)
    data = PromptDataModule(
        model,
        str(folder / "prompts.jsonl"),
        prompts_per_epoch=work.prompts,
        group_size=work.group,
        max_prompt_tokens=work.prompt_tokens,
    )
    watch = Stopwatch()
    trainer = Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=args.micro_batches,
        callbacks=[rollout, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accelerator="auto",
        devices=1,
    )
    trainer.fit(module, datamodule=data)
    return summary(work, watch)


def summary(work: Work, watch: Stopwatch) -> dict[str, Any]:
    seconds = watch.seconds[WARM_UP:]
    parts = {name: statistics.median(values[WARM_UP:]) for name, values in watch.parts.items()}
    update = [sum(parts) for parts in zip(*watch.parts.values(), strict=True)][WARM_UP:]
    flops = [work.update_flops(epoch) for epoch in range(WARM_UP, WARM_UP + len(update))]
    tokens = [sum(map(sum, work.completion_lengths(WARM_UP + i))) for i in range(len(seconds))]
    parts["sampling"] = statistics.median(watch.sampling[WARM_UP:])
    peaks = watch.peaks[WARM_UP:]
    return {
        "iterations": seconds,
        "seconds": statistics.median(seconds),
        "parts": parts,
        "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_fraction": statistics.median(
            n / s / peak for n, s, peak in zip(flops, update, peaks, strict=True)
        ),
        "matmul_gflops": statistics.median(peaks) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--sampler", default="vllm", choices=("vllm", "hf"))
    parser.add_argument("--iterations", default=6, type=int)
    parser.add_argument("--micro-batches", default=8, type=int, help="an update")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the models")
    parser.add_argument("--compile-engine", action="store_true", help="compile vLLM's model")
    args = parser.parse_args()
    work = work_of(args)
    with tempfile.TemporaryDirectory() as folder:
        result = run(work, args, Path(folder))
    print(json.dumps({"work": vars(work), "options": vars(args), **result}))


if __name__ == "__main__":
    main()
