"""Process Reward Learning for language models, in PyTorch Lightning.

Only the version lives here, so that ``prl_lightning.functional`` imports with torch alone.
"""

__version__ = "0.2.0"
