"""An iteration on a real model, ours and TRL's in turn. Needs the extras bench, gym and lora.

    make demo                        # makes runs/smollm2/model, the model of the benchmark
    python benchmarks/bench_real.py --out benchmarks/results/real.json

SmolLM2-135M-Instruct on sums of reasoning-gym in float32: 4 prompts x 8 completions that end by
themselves, a reference, one update. TRL generates with transformers, as it does on a machine
without a GPU. "default" trains on the whole batch at once, "tuned" in micro-batches of 8 with a
static cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench_step import Stopwatch
from bench_trl import StepTimes, compare, config_of
from prl_lightning.callbacks import RolloutCallback
from prl_lightning.data import GymTask, PromptDataModule, ReasoningGym
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.sampling import VLLMSampler
from prl_lightning.trainer import PRLTrainer
from report import publish
from turns import in_turn
from work import matmul_rate, reward

TASKS = {"chain_sum": GymTask(config={"min_terms": 2, "max_terms": 2})}
TEMPERATURE, BETA, WARM_UP = 0.7, 0.01, 1
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SIZES = {"prompts": 4, "group": 8, "max_new_tokens": 64, "iterations": 3}


def source(args: argparse.Namespace) -> ReasoningGym:
    return ReasoningGym(TASKS, size=args.prompts * (WARM_UP + args.iterations), instruction=None)


class Held(Stopwatch):
    """Also what the process holds at the end of an iteration, apart from files that it maps."""

    def __init__(self) -> None:
        super().__init__()
        self.held_mib = 0.0

    def on_train_epoch_end(self, *args: Any) -> None:
        super().on_train_epoch_end(*args)
        lines = Path("/proc/self/status").read_text().splitlines()
        (anonymous,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
        self.held_mib = max(self.held_mib, int(anonymous) / 1024)


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    data = PromptDataModule(
        args.model, source(args), prompts_per_epoch=args.prompts, group_size=args.group,
        max_prompt_tokens=128,
    )  # fmt: skip
    rollout = RolloutCallback(
        [reward], VLLMSampler(cache_gib=0.25, enforce_eager=not args.engine_compile),
        temperature=TEMPERATURE, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    watch = Held()
    trainer = PRLTrainer(
        max_epochs=WARM_UP + args.iterations,
        accumulate_grad_batches=args.micro_batches,
        callbacks=[rollout, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = PRLModule(
        args.model,
        Objective(beta=BETA),
        optimizer=partial(torch.optim.AdamW, lr=1e-6, fused=True),  # TRL's is fused, too
        lora=LORA if args.lora else None,
        compile=args.compile,
    )
    trainer.fit(module, datamodule=data)
    parts = {name: statistics.median(values[WARM_UP:]) for name, values in watch.parts.items()}
    return {
        "iterations": watch.seconds[WARM_UP:],
        "parts": parts | {"sampling": statistics.median(watch.sampling[WARM_UP:])},
        "matmul_gflops": statistics.median(watch.peaks) / 1e9,
        "held_mib": watch.held_mib,
        "peak_rss_mib": _peak(),
    }


def run_trl(args: argparse.Namespace, tuned: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOTrainer

    problems = source(args)
    rows = [problems.row(position, 0)["prompt"] for position in range(len(problems))]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(
            args, Path(folder), 8 if tuned else None,
            max_steps=WARM_UP + args.iterations, temperature=TEMPERATURE,
        )  # fmt: skip
        trainer = GRPOTrainer(
            args.model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": text}]} for text in rows]
            ),
            callbacks=[times],
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if args.lora else None,
        )
        trainer.train()
    return {
        "iterations": times.seconds[WARM_UP:],
        "matmul_gflops": matmul_rate() / 1e9,
        "peak_rss_mib": _peak(),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/smollm2/model")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=int)
    parser.add_argument("--micro-batches", default=4, type=int, help="of ours, an update")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--compile", action="store_true", help="of ours")
    parser.add_argument("--engine-compile", action="store_true", help="of ours")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--who", nargs="+", default=["ours", "trl default", "trl tuned"])
    parser.add_argument("--only", help="run one of them in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    if args.only:
        ours = args.only == "ours"
        print(json.dumps(run_ours(args) if ours else run_trl(args, args.only == "trl tuned")))
        return
    sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
    sizes += [f"--model={args.model}", f"--micro-batches={args.micro_batches}"]
    switches = ("lora", "compile", "engine_compile")
    sizes += [f"--{name.replace('_', '-')}" for name in switches if getattr(args, name)]
    commands = {name: ["bench_real.py", *sizes, "--only", name] for name in args.who}
    work = {name: getattr(args, name) for name in (*SIZES, "micro_batches", *switches)}
    publish({"work": work, **compare(in_turn(commands, args.rounds))}, args.out)


if __name__ == "__main__":
    main()
