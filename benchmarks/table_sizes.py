"""Print what `prl check` says of memory and time for models of three sizes, as a Markdown table.

    python benchmarks/table_sizes.py

The configurations of the models are written out here, so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from transformers import AutoConfig

from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.cli import main as prl

ROOT = Path(__file__).parents[1]
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_attention_heads": 32}
# From the models' config.json on the Hub.
MODELS = {
    "Qwen2.5-0.5B": ("qwen2", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }),
    "Qwen3-4B": ("qwen3", QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    }),
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "tie_word_embeddings": False,
    }),
}  # fmt: skip
OWN, V2 = ["configs/own.yaml"], ["configs/paper/v2.yaml"]
LARGE = [*V2, "configs/paper/v2-qwen3-30b-a3b.yaml"]
SHARED = "--rollout.sampler.init_args.tensor_parallel_size=8"
# Model, GPU, its memory in GB, configurations, further arguments.
ROWS = (
    ("Qwen2.5-0.5B", "RTX4090", 24, OWN, []),
    ("Qwen3-4B", "H100", 80, V2, []),
    ("Qwen3-30B-A3B", "H20", 96, LARGE, [SHARED]),
    ("Qwen3-30B-A3B", "H100", 80, LARGE, [SHARED, "--trainer.num_nodes=1",
                                          "--trainer.precision=bf16-true",
                                          "--trainer.accumulate_grad_batches=40"]),
)  # fmt: skip


def check(model: str, gpu: str, configs: list[str], more: list[str]) -> str:
    """The text of `prl check`."""
    kind, sizes = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind, **sizes).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        rows = Path(folder) / "rows.jsonl"
        rows.write_text('{"prompt": "1+1?", "answer": "2"}\n')
        files = [f"--config={ROOT / file}" for file in configs]
        data = [f"--data.train={rows}", f"--evaluation.sets={{heldout: {rows}}}"]
        words = [*files, *data, f"--model.policy={folder}", f"--gpu={gpu}", *more]
        with contextlib.redirect_stdout(io.StringIO()) as text:
            prl(["check", *words, "--trainer.accelerator=cpu"])
    return text.getvalue()


def main() -> None:
    for model, gpu, memory, configs, more in ROWS:
        print(f"## {model} on {gpu} of {memory} GB: {' '.join(configs + more)}")
        print(check(model, gpu, configs, more))


if __name__ == "__main__":
    main()
