"""What only SubprocessSampler promises; the rest is in test_protocol.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prl_lightning.sampling import Progress, Sampler, SamplingConfig, SubprocessSampler
from prl_lightning.sampling.subprocess import _of_machine
from prl_lightning.types import Completion, Prompt

CONFIG = SamplingConfig(n=1, temperature=1.0, max_new_tokens=1, stop_token_ids=(1,))
PROMPTS = [Prompt([5], "")]


class Telling(Sampler):
    """Its tokens are its process, its GPU, and the sum of the weights it was given."""

    dtype = "float32"

    def start(self, model: str, max_model_tokens: int) -> None:
        self.total = 0.0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.total = sum(float(tensor.sum()) for _, tensor in weights)

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        if config.max_new_tokens == 0:
            raise KeyError("no room")
        if config.max_new_tokens > 1:
            time.sleep(600)
        gpu = int(os.environ.get("CUDA_VISIBLE_DEVICES", "-1"))
        return [[Completion([os.getpid(), gpu, int(self.total)], [], True)]]

    def stop(self) -> None:
        pass


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[SubprocessSampler]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started = SubprocessSampler(Telling(), gpus=[3])
    started.start("model", 8)
    yield started
    started.stop()


def tokens(sampler: SubprocessSampler) -> list[int]:
    return sampler.generate(PROMPTS, CONFIG)[0][0].token_ids


def wait_for_the_end_of(process: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_it_works_elsewhere_and_leaves_the_policys_tensors_alone(
    sampler: SubprocessSampler,
) -> None:
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    sampler.load_weights([("a", weight), ("b", torch.ones(4, dtype=torch.bfloat16))])
    process, gpu, total = tokens(sampler)
    assert process != os.getpid()
    assert (gpu, total) == (3, 10)
    assert not weight.is_shared()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] != "3"


def test_gpus_are_counted_among_those_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _of_machine(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e")
    assert _of_machine(1) == "GPU-5e"
    with pytest.raises(ValueError, match=r"gpus has 2, but CUDA_VISIBLE_DEVICES=4,GPU-5e"):
        _of_machine(2)


def test_an_error_there_is_raised_here_and_it_goes_on(sampler: SubprocessSampler) -> None:
    full = SamplingConfig(n=1, temperature=1.0, max_new_tokens=0, stop_token_ids=(1,))
    with pytest.raises(KeyError, match="no room"):
        sampler.generate(PROMPTS, full)
    assert tokens(sampler)[0] != os.getpid()


def test_a_process_that_is_killed_is_one_clear_error(sampler: SubprocessSampler) -> None:
    os.kill(tokens(sampler)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the process of Telling has ended.*killed, mostly for"):
        sampler.generate(PROMPTS, CONFIG)


def test_stop_ends_the_process_and_start_begins_another(sampler: SubprocessSampler) -> None:
    first = tokens(sampler)[0]
    sampler.stop()
    assert wait_for_the_end_of(first)
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        sampler.generate(PROMPTS, CONFIG)
    sampler.start("model", 8)
    assert tokens(sampler)[0] != first


def test_stop_does_not_wait_for_what_is_being_drawn(sampler: SubprocessSampler) -> None:
    long = SamplingConfig(n=1, temperature=1.0, max_new_tokens=2, stop_token_ids=(1,))
    process = tokens(sampler)[0]
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(sampler.generate, PROMPTS, long)
        time.sleep(0.5)
        start = time.monotonic()
        sampler.stop()
        assert time.monotonic() - start < 30
        assert isinstance(drawing.exception(timeout=30), RuntimeError)
    assert wait_for_the_end_of(process)


def test_too_few_gpus_for_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_node_local_rank", lambda fallback: 1)
    with pytest.raises(ValueError, match=r"gpus=\[3\] has none for local rank 1"):
        SubprocessSampler(Telling(), gpus=[3]).start("model", 8)


def test_it_does_not_outlive_a_trainer_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import time\n"
        "from prl_lightning.sampling import SubprocessSampler\n"
        "from sampling.test_subprocess import Telling, tokens\n"
        "if __name__ == '__main__':\n"
        "    sampler = SubprocessSampler(Telling())\n"
        "    sampler.start('model', 8)\n"
        "    print(tokens(sampler)[0], flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        process = int(trainer.stdout.readline())
        trainer.kill()
    assert wait_for_the_end_of(process)
