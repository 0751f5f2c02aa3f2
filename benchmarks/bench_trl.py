"""The same work with TRL's GRPOTrainer, in turn with ours, and the ratios. Needs the extra bench.

    python benchmarks/bench_trl.py --hidden 512 --layers 8 --heads 8 --prompts 8 \
        --max-new-tokens 128 --lengths lognormal --out benchmarks/results/trl_21m_lognormal.json

TRL generates with transformers, as it does on a machine without a GPU. "default" trains on the
whole batch at once, "tuned" in micro-batches of 16 with a static cache; gradient checkpointing is
off in both. "ours compiled" has ``model.compile`` on. All keep a reference and do one update an
iteration.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TrainerCallback

from report import publish
from turns import in_turn
from work import Work, add_arguments, make, reward, sizes_of, work_of

WARM_UP = 1


class GivenLengths(LogitsProcessor):
    """Every row ends where it is told to, and not before."""

    def __init__(self, lengths: Tensor, prompt_width: int, eos: int) -> None:
        self.lengths = lengths
        self.eos = eos
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids.shape[1] - self.prompt_width
        ends = self.lengths - 1 == drawn
        is_eos = torch.arange(scores.shape[1]) == self.eos
        return scores.masked_fill(ends[:, None] != is_eos, -torch.inf)


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.seconds:
            self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._start)
        self._start = now


def config_of(sizes: Any, folder: Path, tuned: int | None, **options: Any) -> Any:
    """TRL's configuration of an update with a reference.

    Args:
        sizes: have ``prompts``, ``group`` and ``max_new_tokens``.
        folder: for its files.
        tuned: completions of a micro-batch, with a static cache; None takes the whole batch.
        options: further ones.
    """
    from trl import GRPOConfig

    batch = sizes.prompts * sizes.group
    micro_batch = min(tuned or batch, batch)
    return GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        num_generations=sizes.group,
        max_completion_length=sizes.max_new_tokens,
        beta=0.01,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        cache_implementation="static" if tuned else None,
        **options,
    )


def run_trl(work: Work, iterations: int, tuned: bool, folder: Path) -> dict[str, Any]:
    from datasets import load_dataset
    from trl import GRPOTrainer

    steps = WARM_UP + iterations
    make(work, folder, steps)
    config = config_of(work, folder, 16 if tuned else None, max_steps=steps)
    times = StepTimes()
    trainer = GRPOTrainer(
        str(folder / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        callbacks=[times],
    )
    _force_lengths(trainer.model, work)
    trainer.train()
    return {
        "iterations": times.seconds[WARM_UP:],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _force_lengths(model: Any, work: Work) -> None:
    generate, epochs = model.generate, work.lengths_of_epochs()

    def generate_of_lengths(input_ids: Tensor, **kwargs: Any) -> Any:
        lengths = torch.tensor(next(epochs)).flatten()
        processor = GivenLengths(lengths, input_ids.shape[1], model.config.eos_token_id)
        return generate(input_ids, **kwargs, logits_processor=[processor])

    model.generate = generate_of_lengths


def commands_of(args: argparse.Namespace, work: Work) -> dict[str, list[str]]:
    sizes = [*sizes_of(work), "--iterations", str(args.iterations)]
    return {
        "ours": ["bench_step.py", *sizes],
        "ours compiled": ["bench_step.py", *sizes, "--compile"],
        "trl default": ["bench_trl.py", *sizes, "--only", "default"],
        "trl tuned": ["bench_trl.py", *sizes, "--only", "tuned"],
    }


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def seconds(name: str) -> float:
        return statistics.median([s for result in results[name] for s in result["iterations"]])

    def memory(name: str) -> float:
        return statistics.median([result["peak_rss_mib"] for result in results[name]])

    def ratios(measure: Callable[[str], float]) -> dict[str, dict[str, float]]:
        peers = [name for name in results if name.startswith("trl")]
        ours = [name for name in results if name.startswith("ours")]
        return {name: {peer: measure(name) / measure(peer) for peer in peers} for name in ours}

    return {
        "seconds": {name: seconds(name) for name in results},
        "peak_rss_mib": {name: memory(name) for name in results},
        "ratio_of_seconds": ratios(seconds),
        "ratio_of_memory": ratios(memory),
        "runs": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--iterations", default=3, type=int, help="of each process")
    parser.add_argument("--rounds", default=2, type=int)
    parser.add_argument("--only", choices=("default", "tuned"), help="TRL alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = work_of(args)
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            result = run_trl(work, args.iterations, args.only == "tuned", Path(folder))
        print(json.dumps(result))
        return
    results = in_turn(commands_of(args, work), args.rounds)
    result = {"work": vars(work), **compare(results)}
    publish(result, args.out)


if __name__ == "__main__":
    main()
