"""Engines that draw completions, behind one protocol."""

from prl_lightning.samplers.base import Progress, Sampler, SamplingConfig
from prl_lightning.samplers.hf import HFSampler
from prl_lightning.samplers.process import ProcessSampler
from prl_lightning.samplers.vllm import VLLMSampler

__all__ = ["HFSampler", "ProcessSampler", "Progress", "Sampler", "SamplingConfig", "VLLMSampler"]
