"""Samplers: engines that sample completions, with one interface."""

from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.sampling.hf import HFSampler
from prl_lightning.sampling.nccl_transfer import NCCLTransfer
from prl_lightning.sampling.server import VLLMServerSampler
from prl_lightning.sampling.subprocess import SubprocessSampler
from prl_lightning.sampling.vllm import VLLMSampler
from prl_lightning.sampling.weight_transfer import FolderTransfer, WeightTransfer

__all__ = [
    "FolderTransfer",
    "HFSampler",
    "NCCLTransfer",
    "Progress",
    "Sampler",
    "SamplingConfig",
    "SubprocessSampler",
    "VLLMSampler",
    "VLLMServerSampler",
    "WeightTransfer",
]
