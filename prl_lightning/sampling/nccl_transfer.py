"""NCCLTransfer: weights from the trainer's GPU to those of a vLLM server."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor

from prl_lightning.sampling.server_client import ServerClient
from prl_lightning.sampling.server_facts import ServerFacts
from prl_lightning.sampling.weight_transfer import PART_BYTES, WeightTransfer, parts


class NCCLTransfer(WeightTransfer):
    """Broadcast from rank 0's GPU to the server's, with vLLM's own weight transfer.

    The server needs ``--weight-transfer-config '{"backend": "nccl"}'``, the trainer vLLM's CUDA
    build. It follows vLLM's ``NCCLTrainerWeightTransferEngine``, which would need the shapes of all
    weights before the first is gathered.

    Args:
        address: of this machine, at which the server's workers reach rank 0.
        port: to listen on, at this address; 0 takes a free one.
    """

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.address = address
        self.port = port
        self._group: Any = None

    def complaints(self, facts: ServerFacts) -> Iterator[str]:
        """See ``WeightTransfer.complaints``."""
        backend = (facts.config["weight_transfer_config"] or {}).get("backend")
        if backend != "nccl":
            yield (
                f"NCCLTransfer: the vLLM server has weight_transfer_config.backend={backend}. "
                'Start it with --weight-transfer-config \'{"backend": "nccl"}\'.'
            )
        if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
            yield (
                "NCCLTransfer needs a GPU and vLLM in the trainer's process. Set "
                "rollout.sampler.transfer to prl_lightning.sampling.FolderTransfer."
            )

    def send(self, client: ServerClient, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``WeightTransfer.send``."""
        if self._group is None:
            self._group = self._connect(client)
        client.post("/start_weight_update")
        for part in parts(weights, PART_BYTES):
            self._broadcast(client, part)
        client.post("/finish_weight_update")

    def close(self, client: ServerClient) -> None:
        """See ``WeightTransfer.close``."""
        group, self._group = self._group, None
        if group is not None:
            client.post("/shutdown_weight_transfer_engine")
            group.destroy()

    def _connect(self, client: ServerClient) -> Any:
        """Open the process group: rank 0 of the trainer, then the server's workers."""
        from vllm.distributed.weight_transfer import nccl_common

        place = nccl_common.NCCLWeightTransferInitInfo(
            master_address=self.address,
            master_port=self.port or find_free_network_port(),
            rank_offset=1,
            world_size=1 + client.get("/get_world_size")["world_size"],
        )
        body = {"init_info": nccl_common.worker_init_payload(place)}
        # The workers wait in this request for the trainer, so both must connect at once.
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(client.post, "/init_weight_transfer_engine", body)
            group = nccl_common.trainer_init(place)
            answer.result()
        return group

    def _broadcast(self, client: ServerClient, part: list[tuple[str, Tensor]]) -> None:
        on_gpu = [(name, tensor.detach().cuda().contiguous()) for name, tensor in part]
        info = {
            "names": [name for name, _ in on_gpu],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in on_gpu],
            "shapes": [list(tensor.shape) for _, tensor in on_gpu],
        }
        stream = torch.cuda.current_stream()
        thread = ThreadPoolExecutor(1)
        try:
            # The workers receive during this request.
            answer = thread.submit(client.post, "/update_weights", {"update_info": info})
            for _, tensor in on_gpu:
                self._group.broadcast(tensor, src=0, stream=stream)
            answer.result()
        finally:
            thread.shutdown(wait=False)  # after an error, the workers would never answer
        stream.synchronize()
