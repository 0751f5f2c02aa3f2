"""The mesh of a strategy that shards: how the ranks divide the copies of a model."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

REPLICATE, SHARD = "replicate", "shard"  # dimensions of a mesh with several copies


def hybrid_mesh(device: str, replicas: int, ranks: int) -> DeviceMesh:
    """Return a mesh with several copies of a model, each sharded over neighbouring ranks.

    Args:
        device: type of the ranks' devices.
        replicas: number of copies, a divisor of ``ranks``.
        ranks: of the Trainer.
    """
    shape, names = (replicas, ranks // replicas, 1), (REPLICATE, SHARD, "tensor_parallel")
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    mesh[REPLICATE, SHARD]._flatten("data_parallel")  # the name by which Lightning finds the ranks
    return mesh


def sharded_dimensions(mesh: DeviceMesh) -> DeviceMesh:
    """Return the dimensions that ``fully_shard`` takes: with several copies, those are two."""
    names = mesh.mesh_dim_names or ()
    return mesh[REPLICATE, SHARD] if REPLICATE in names else mesh["data_parallel"]
