"""NCCLTransfer against the receiving side of vLLM's own source, without a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_vllm import FakeVLLM, Handler, fake_vllm
from prl_lightning.sampling import NCCLTransfer, VLLMServerSampler, nccl_transfer
from prl_lightning.sampling.weight_transfer import parts

WEIGHTS = [
    ("a.weight", torch.arange(6.0).reshape(2, 3)),
    ("b.weight", torch.arange(8.0).reshape(2, 4).T),  # not contiguous
    ("c.bias", torch.ones(3, dtype=torch.bfloat16)),
    ("d.weight", torch.full((5,), 2.0)),
]


class Group:
    """One end of a broadcast in memory."""

    def __init__(self, sent: SimpleQueue[Tensor], sends: bool) -> None:
        self.sent = sent
        self.sends = sends
        self.is_destroyed = False

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        assert src == 0
        assert tensor.is_contiguous()  # NCCL sends what follows its first element
        if self.sends:
            self.sent.put(tensor)
        else:
            tensor.copy_(self.sent.get(timeout=600))

    def destroy(self) -> None:
        self.is_destroyed = True


class Worker:
    """vLLM's receiving engine, whose model keeps the weights."""

    def __init__(self, group: Group) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.engine = NCCLWeightTransferEngine.__new__(NCCLWeightTransferEngine)
        self.engine.model_update_group = group
        self.engine.device = torch.device("cpu")
        self.engine.model = self
        self.init: Any = None
        self.loaded: list[tuple[str, Tensor]] = []
        self.updates = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loaded += weights

    def initialize(self, handler: Handler, body: Any) -> None:
        self.init = self.engine.parse_init_info(body["init_info"])
        self.engine.packed = self.init.packed
        handler.give(200, None)

    def update(self, handler: Handler, body: Any) -> None:
        self.updates += 1
        self.engine.receive_weights(self.engine.parse_update_info(body["update_info"]))
        handler.give(200, None)


@pytest.fixture
def server(tied_model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    with fake_vllm(tied_model) as server:
        yield server


@pytest.mark.process  # of the import of vLLM
def test_vllms_worker_receives_what_is_sent(
    server: FakeVLLM, tied_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer import nccl_common

    sent = SimpleQueue[Tensor]()
    ours, worker = Group(sent, sends=True), Worker(Group(sent, sends=False))
    places = []
    monkeypatch.setattr(nccl_common, "trainer_init", lambda place: places.append(place) or ours)
    monkeypatch.setattr(nccl_transfer, "PART_BYTES", 60)
    server.answers = {
        "/init_weight_transfer_engine": worker.initialize,
        "/update_weights": worker.update,
    }
    sampler = VLLMServerSampler(server.url, NCCLTransfer())
    sampler.start(tied_model, 8)
    for _ in range(2):  # connected once
        worker.loaded, server.calls = [], []
        sampler.load_weights(WEIGHTS)
        assert [name for name, _ in worker.loaded] == [name for name, _ in WEIGHTS]
        for (_, received), (_, weight) in zip(worker.loaded, WEIGHTS, strict=True):
            assert received.dtype == weight.dtype
            assert torch.equal(received, weight)
    assert worker.updates == 4  # the first two weights have 56 bytes
    assert server.paths() == [
        "/pause?mode=wait",
        "/start_weight_update",
        "/update_weights",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    (place,) = places
    assert place.world_size == worker.init.world_size == 3  # the trainer and two workers
    assert (place.master_address, place.master_port) == (
        worker.init.master_address,
        worker.init.master_port,
    )
    assert worker.init.rank_offset == 1
    sampler.stop()
    assert ours.is_destroyed
    assert server.paths()[-1] == "/shutdown_weight_transfer_engine"


@pytest.mark.parametrize("config", [None, {"backend": "ipc"}])
def test_a_server_with_another_backend(server: FakeVLLM, config: Any) -> None:
    server.config["weight_transfer_config"] = config
    (message,) = VLLMServerSampler(server.url, NCCLTransfer()).missing_requirements()
    assert f"backend={config and config['backend']}" in message
    assert "--weight-transfer-config" in message


def test_a_trainer_without_a_gpu(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (message,) = VLLMServerSampler(server.url, NCCLTransfer()).missing_requirements()
    assert "FolderTransfer" in message


@pytest.mark.parametrize(
    ("limit", "names"),
    [(1, ["a", "b", "c", "d"]), (56, ["ab", "cd"]), (10**9, ["abcd"])],
)
def test_parts_have_a_largest_size(limit: int, names: list[str]) -> None:
    found = ["".join(name[0] for name, _ in part) for part in parts(WEIGHTS, limit)]
    assert found == names
