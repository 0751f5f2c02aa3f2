"""WeightTransfer: the ways on which the trainer's weights reach a vLLM server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prl_lightning.sampling.server_client import ServerClient, ServerError
from prl_lightning.sampling.server_facts import ServerFacts

PART_BYTES = 2**30  # sent at a time; rank 0 holds as much besides the policy
READABLE_FORMATS = ("auto", "hf", "safetensors")  # vLLM's load formats that read safetensors


class WeightTransfer(ABC):
    """Send weights to a server; only rank 0 does."""

    @abstractmethod
    def complaints(self, facts: ServerFacts) -> Iterator[str]:
        """Yield the server's settings with which it takes no weights, with the fix."""

    @abstractmethod
    def send(self, client: ServerClient, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights of a paused server.

        Args:
            client: of the server.
            weights: see ``Sampler.load_weights``.

        Raises:
            ServerError: the server does not take them.
        """

    def close(self, client: ServerClient) -> None:  # noqa: B027  (optional)
        """End the connection, if ``send`` has left one."""


class FolderTransfer(WeightTransfer):
    """Write safetensors into a temporary folder, which the server reads.

    It works for any hardware and any parallelism of the server.

    Args:
        folder: where the temporary folder is created. The server must see it under the same path:
            a folder in memory on one machine, a shared file system on several. It takes the size
            of the weights.
    """

    def __init__(self, folder: str = "/dev/shm") -> None:
        self.folder = folder

    def complaints(self, facts: ServerFacts) -> Iterator[str]:
        """See ``WeightTransfer.complaints``."""
        load_format = facts.config["load_config"]["load_format"]
        if load_format not in READABLE_FORMATS:
            yield (
                f"The vLLM server has load_format={load_format}, with which it reads no folder of "
                "safetensors. Start it without --load-format."
            )
        if not Path(self.folder).is_dir():
            yield (
                f"FolderTransfer.folder={self.folder}: there is no such folder. Name one that the "
                "vLLM server sees under the same path."
            )

    def send(self, client: ServerClient, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``WeightTransfer.send``."""
        try:
            with TemporaryDirectory(prefix="prl-weights-", dir=self.folder) as folder:
                for number, part in enumerate(parts(weights, PART_BYTES)):
                    file = Path(folder, f"model-{number:05d}.safetensors")
                    # Copies: a file cannot hold two tensors that share memory.
                    save_file({name: x.detach().cpu().clone() for name, x in part}, file)
                call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                client.post("/collective_rpc", call)
        except (OSError, SafetensorError, ServerError) as error:
            raise ServerError(
                f"FolderTransfer.folder={self.folder}: the weights did not reach the vLLM server. "
                "The folder must have room for them, and the server must be able to read it under "
                f"the same path. {type(error).__name__}: {error}"
            ) from error


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
        if not torch.cuda.is_available():
            yield (
                "NCCLTransfer needs a GPU in the trainer's process. Set rollout.sampler.transfer "
                "to prl_lightning.sampling.FolderTransfer."
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


def parts(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield weights in parts of at most ``limit`` bytes, or of one larger tensor."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    if part:
        yield part
