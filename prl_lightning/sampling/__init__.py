"""Samplers: engines that sample completions, with one interface."""

from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.sampling.hf import HFSampler
from prl_lightning.sampling.subprocess import SubprocessSampler
from prl_lightning.sampling.vllm import VLLMSampler

__all__ = ["HFSampler", "SubprocessSampler", "Progress", "Sampler", "SamplingConfig", "VLLMSampler"]
