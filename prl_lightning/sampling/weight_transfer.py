"""WeightTransfer: the ways on which the trainer's weights reach a vLLM server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prl_lightning.sampling.server_client import ServerClient, ServerError
from prl_lightning.sampling.server_facts import ServerFacts

PART_BYTES = 2**30  # sent at a time; rank 0 holds as much besides the policy
READABLE_FORMATS = ("auto", "hf", "safetensors")  # vLLM's load formats that read safetensors


class WeightTransfer(ABC):
    """Send weights to a server; only rank 0 does.

    Attributes:
        sends_in_thread: whether ``send`` may run in a thread while the trainer trains, with tensors
            in main memory.
    """

    sends_in_thread = False

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

    sends_in_thread = True

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
