"""What only SubprocessSampler guarantees; for the rest see test_protocol.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import psutil
import pytest
import torch
from torch import Tensor

from prl_lightning.sampling import Progress, Sampler, SamplingConfig, SubprocessSampler
from prl_lightning.types import Completion, Prompt

pytestmark = pytest.mark.process

CONFIG = SamplingConfig(n=1, temperature=1.0, max_new_tokens=1, stop_token_ids=(1,))
FAILS, HANGS = replace(CONFIG, max_new_tokens=0), replace(CONFIG, max_new_tokens=2)
PROMPTS = [Prompt([5], "")]


class Telling(Sampler):
    """Its tokens are its process id, its GPU, and the sum of its weights."""

    dtype = "float32"

    def start(self, model: str, max_model_tokens: int) -> None:
        self.total = 0.0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.total = sum(float(tensor.sum()) for _, tensor in weights)

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        if on_progress is not None:
            on_progress({}, 0)
        if config == FAILS:
            raise KeyError("no room")
        if config == HANGS:
            time.sleep(600)
        gpu = int(os.environ.get("CUDA_VISIBLE_DEVICES", "-1"))
        return [[Completion([os.getpid(), gpu, int(self.total)], [], True)]]

    def stop(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def _four_gpus() -> Iterator[None]:
    """This process sees four GPUs, under other numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        patch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
        yield


@pytest.fixture(scope="module")
def sampler() -> Iterator[SubprocessSampler]:
    started = SubprocessSampler(Telling(), gpus=[3])
    started.start("model", 8)
    yield started
    started.stop()


def tokens(sampler: SubprocessSampler) -> list[int]:
    return sampler.generate(PROMPTS, CONFIG)[0][0].token_ids


def test_the_engine_has_its_own_process_gpu_and_weights(sampler: SubprocessSampler) -> None:
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    sampler.load_weights([("a", weight), ("b", torch.ones(4, dtype=torch.bfloat16))])
    process, gpu, total = tokens(sampler)
    assert process != os.getpid()
    assert (gpu, total) == (7, 10)
    assert not weight.is_shared()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


def test_an_exception_of_the_engine_is_raised_and_it_continues(sampler: SubprocessSampler) -> None:
    process = tokens(sampler)[0]
    with pytest.raises(KeyError, match="no room") as error:
        sampler.generate(PROMPTS, FAILS)
    assert "in generate" in error.value.__notes__[0]  # the traceback in the subprocess
    assert tokens(sampler)[0] == process


def test_a_killed_process_is_an_error_and_start_begins_another(sampler: SubprocessSampler) -> None:
    first = tokens(sampler)[0]
    os.kill(first, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="subprocess of Telling ended"):
        tokens(sampler)
    sampler.stop()
    with pytest.raises(RuntimeError, match=r"SubprocessSampler.*start\(\)"):
        tokens(sampler)
    sampler.start("model", 8)
    assert tokens(sampler)[0] != first


def test_stop_ends_the_process_while_it_samples(sampler: SubprocessSampler) -> None:
    process = tokens(sampler)[0]
    is_sampling = Event()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(sampler.generate, PROMPTS, HANGS, lambda *_: is_sampling.set())
        assert is_sampling.wait(timeout=300)
        sampler.stop()
        assert isinstance(running.exception(timeout=300), RuntimeError)
    assert not psutil.pid_exists(process)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [([4], r"SubprocessSampler\.gpus=\[4\].* 4 GPUs"), ([3], r"gpus=\[3\].*local rank 1")],
)
def test_gpus_that_do_not_exist_for_a_rank(
    monkeypatch: pytest.MonkeyPatch, gpus: list[int], message: str
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_node_local_rank", lambda fallback: 1)
    with pytest.raises(ValueError, match=message):
        SubprocessSampler(Telling(), gpus=gpus).start("model", 8)


PROGRAM = """
from prl_lightning.sampling import SubprocessSampler
from sampling.test_subprocess import Telling, tokens

class Own(Telling):
    pass

sampler = SubprocessSampler(Own())
sampler.start("model", 8)
print(tokens(sampler)[0], flush=True)
"""


def test_the_process_ends_when_the_trainer_is_killed_or_exits(tmp_path: Path) -> None:
    """Programs without ``if __name__ == "__main__"``, as a file and from stdin."""
    (tmp_path / "trainer.py").write_text(PROGRAM + "import time; time.sleep(600)")
    killed, exits = (
        subprocess.Popen(
            [sys.executable, program],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for program in (str(tmp_path / "trainer.py"), "-")
    )  # fmt: skip
    with killed, exits:
        said, _ = exits.communicate(PROGRAM, timeout=300)
        assert killed.stdout is not None
        engines = [int(killed.stdout.readline()), int(said)]
        killed.kill()
    assert exits.returncode == 0
    for engine in engines:
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(engine).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
