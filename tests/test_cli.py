"""What a user meets: one command, its run folder, resuming, and clear errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.cli import main, run_command
from prl_lightning.cli.lightning import CheckCLI, command_line
from prl_lightning.cli.tools import TOOLS
from prl_lightning.data import DataError
from prl_lightning.runs.files import read_metrics
from tiny_runs import ARITHMETIC, fit, metrics_of, summary_line, tiny_overrides

pytestmark = pytest.mark.process

PRL = str(Path(sys.executable).with_name("prl"))  # the installed command


@pytest.mark.parametrize("model", ["tied_model", "untied_model"])
def test_fit_with_the_vllm_engine(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(model)
    fit(*tiny_overrides(path, tmp_path, "VLLMSampler"), "--rollout.sampler.cache_gib=0.1")
    metrics = metrics_of(tmp_path)
    # The gap is measured after each update: a weight that is not sent would show in the second.
    assert len(metrics["rollout/engine_gap_max"]) == 2
    assert max(metrics["rollout/engine_gap_max"]) < 1e-4
    assert max(metrics["train/grad_norm"]) > 0


def test_fit_that_samples_ahead_in_another_process(tied_model: str, tmp_path: Path) -> None:
    fit(
        *tiny_overrides(tied_model, tmp_path, "SubprocessSampler"),
        "--rollout.sampler.sampler=HFSampler",
        *("--rollout.overlap=true", "--rollout.max_staleness=2", "--trainer.max_epochs=5"),
        "--trainer.limit_val_batches=0",  # an evaluation would leave the engine idle
    )
    metrics = metrics_of(tmp_path)
    assert metrics["rollout/staleness"] == [0, 1, 2, 2, 2]
    assert len(metrics["rollout/waiting_seconds"]) == 5


def test_run_folder_has_metrics_config_and_checkpoint(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*tiny_overrides(tied_model, tmp_path))
    run = tmp_path / "run" / "version_0"
    assert {file.name for file in run.iterdir()} >= {"metrics.csv", "config.yaml"}
    assert (run / "checkpoints" / "last.ckpt").is_file()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["policy"] == str(tied_model)
    assert config["model"]["objective"]["beta"] == 0.01
    # The base model is evaluated before the first update, then after each epoch.
    values = metrics_of(tmp_path)["val/tiny/mean@4"]
    assert len(values) == 3
    screen = capsys.readouterr().out
    assert re.search(summary_line("mean@4", values), screen)
    assert str(run / "checkpoints" / "last.ckpt") in screen


def test_validate_repeats_the_last_evaluation(tied_model: str, tmp_path: Path) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    fit(*overrides)
    run = tmp_path / "run" / "version_0"
    checkpoint = run / "checkpoints" / "last.ckpt"
    main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)])
    main(["validate", "--config", str(ARITHMETIC), *overrides, "--ckpt_path=last"])
    before = metrics_of(tmp_path)
    for version in (1, 2):
        after = metrics_of(tmp_path, version)
        for name in ("val/tiny/mean@4", "val/tiny/pass@2"):
            assert after[name] == before[name][-1:]


def test_one_command_serves_the_first_run_and_those_that_continue(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    command = [*overrides, "--trainer.callbacks.init_args.every_n_epochs=1", "--ckpt_path=last"]
    fit(*command, "--trainer.max_epochs=1")
    fit(*command, "--trainer.max_epochs=2")
    fit(*command, "--trainer.max_epochs=3")
    fit(*overrides, "--trainer.max_epochs=3")
    resumed, whole = metrics_of(tmp_path, version=2), metrics_of(tmp_path, version=3)
    # Its curves begin with those of the runs that it continues.
    for name in ("rollout/reward", "train/loss", "train/grad_norm", "train/kl_ref"):
        assert resumed[name] == whole[name]
    # The base model is evaluated once, and the summary compares with it.
    values = resumed["val/tiny/mean@4"]
    assert values == whole["val/tiny/mean@4"]
    assert len(re.findall(summary_line("mean@4", values), capsys.readouterr().out)) >= 2
    config = yaml.safe_load((tmp_path / "run" / "version_2" / "config.yaml").read_text())
    assert config["ckpt_path"] == "last"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_last_is_an_error_where_there_is_none_to_evaluate(
    command: str, tied_model: str, tmp_path: Path
) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    with pytest.raises(ConfigurationError, match=r"--ckpt_path last.*default_root_dir=.*run"):
        main([command, "--config", str(ARITHMETIC), *overrides, "--ckpt_path=last"])


def refused(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> str:
    """Call what the command calls, in a folder of the user's; the message that it ends with.

    Python prints such a message, without a traceback, and exits with 1.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["prl", *words])
    with pytest.raises(SystemExit) as ended:
        run_command()
    assert isinstance(ended.value.code, str)
    return ended.value.code


def without_rewards(model: str, folder: Path) -> list[str]:
    """The tests' own rewards are on no path of a user's."""
    return [flag for flag in tiny_overrides(model, folder) if "sample_rewards" not in flag]


def test_a_row_that_cannot_be_rendered_ends_in_one_message(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = without_rewards(tied_model, tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": [{"role": "system"}], "answer": "1"}\n')
    reward = "--rollout.rewards=[prl_lightning.rewards.ExactMatch]"
    said = refused(monkeypatch, tmp_path, "fit", f"--config={ARITHMETIC}", *overrides, reward)
    assert re.search(r"data\.train \(.*train\.jsonl\), row 12: message 0 .*'system'", said)
    assert "\n" not in said


def test_a_reward_beside_the_configuration_is_found(tied_model: str, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **columns):\n    return [float(len(c) < 5) for c in completions]\n"
    )
    one = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    overrides = [
        *without_rewards(tied_model, tmp_path),
        "--rollout.rewards=[my_rewards.short]",
        *one,
    ]
    command = [PRL, "fit", f"--config={ARITHMETIC}"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*command, *overrides], cwd=tmp_path, env=env, check=True)
    assert "rollout/reward" in metrics_of(tmp_path)


def test_what_is_refused_is_a_message_and_no_traceback(tied_model: str, tmp_path: Path) -> None:
    """The process itself; the tests below call the same function here."""
    wrong = ["--data.train=nowhere.jsonl", "--data.group_size=1"]
    overrides = [*without_rewards(tied_model, tmp_path), *wrong]
    command = [PRL, "check", f"--config={ARITHMETIC}"]
    done = subprocess.run([*command, *overrides], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    first, *errors = done.stderr[done.stderr.index("prl: ") :].split("\n- ")
    assert ["group_size=1" in errors[0], "nowhere.jsonl" in errors[1]] == [True, True]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["validate", "--ckpt_path=last"], "--ckpt_path last: no complete checkpoint"),
        # What a constructor refuses,
        (["fit", "--guard.max_skipped=-1"], "guard.max_skipped=-1"),
        (["fit", "--trainer.accelerator=tpu"], "trainer.accelerator='tpu'"),
        (["fit", "--model.objective={kl: loss, steps: 256}"], "model.objective.steps=256"),
        (["validate", "--rollout.limits.seconds=-1"], "limits.seconds=-1.0"),
        (["fit", "--data.format.template=nothing"], "data.format.template='nothing'"),
        # and what the parser does not understand.
        (["fit", "--data.group_size=many"], 'key "data.group_size"'),
        (["fit", "--model.objective.beta=x"], 'key "model.objective.beta"'),
        (["fit", "--rollout.rewards=[no.such_reward]"], "no.such_reward"),
        (["fit", "--rollout.limits.minutes=3"], "--rollout.limits.minutes=3"),
        (["fit", "--model.no_such=1"], "--model.no_such=1"),
    ],
)
def test_a_mistake_is_a_message(
    command: list[str],
    said: str,
    tied_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [f"--config={ARITHMETIC}", *without_rewards(tied_model, tmp_path), *command[1:]]
    assert said in refused(monkeypatch, tmp_path, command[0], *words)


LAST = "prl_lightning.callbacks.LastCheckpoint"
CSV = "lightning.pytorch.loggers.CSVLogger"
BOARD = "lightning.pytorch.loggers.TensorBoardLogger"


@pytest.mark.parametrize(
    ("option", "first", "second", "expected"),
    [
        ("callbacks", [[LAST, {"dirpath": "x"}]], [[LAST, {}]], [[LAST, {}]]),
        ("callbacks", [LAST, {"dirpath": "x"}], [LAST, {}], [[LAST, {}]]),
        ("callbacks", [[LAST, {"dirpath": "x"}]], [LAST, {}], [LAST, {}]),
        # Another class with a parameter of the same name.
        ("logger", [[CSV, {"save_dir": "a", "version": 3}]],
         [[BOARD, {"save_dir": "b"}]], [[BOARD, {"save_dir": "b"}]]),
        ("logger", [CSV, {"save_dir": "a", "version": 3}], [CSV, {"save_dir": "b"}],
         [[CSV, {"save_dir": "b"}]]),
        # Arguments alone change the earlier object.
        ("callbacks", [LAST, {"every_n_epochs": 3}], [None, {"dirpath": "x"}],
         [LAST, {"every_n_epochs": 3, "dirpath": "x"}]),
    ],
)  # fmt: skip
def test_objects_of_a_second_file_replace_the_first_ones(
    option: str, first: Any, second: Any, expected: Any, tmp_path: Path
) -> None:
    def spec(some: Any) -> Any:
        if isinstance(some[0], list):
            return [spec(one) for one in some]
        return ({"class_path": some[0]} if some[0] else {}) | {"init_args": some[1]}

    def parsed(*values: Any, by: str = "file") -> Any:
        words = [*tiny_overrides("no/model", tmp_path), f"--config={ARITHMETIC}"]
        for number, value in enumerate(values):
            file = tmp_path / f"{number}.yaml"
            file.write_text(yaml.safe_dump({"trainer": {option: value}}))
            words.append(f"--config={file}")
        if by == "flag":
            words[-1] = f"--trainer.{option}={json.dumps(values[-1])}"
        return command_line(words, CheckCLI, run=False).config.trainer[option]

    whole = parsed(spec(expected))
    assert parsed(spec(first), spec(second)) == whole
    assert parsed(spec(first), spec(second), by="flag") == whole


def test_a_tool_says_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, tmp_path, "export", "--ckpt_path=nowhere", "--out=out")
    assert said == "prl: ckpt_path=nowhere: there is no such checkpoint."


def test_users_own_data_and_model_are_a_file(tied_model: str, tmp_path: Path) -> None:
    # The template's letters are unknown to the tokenizer, which transformers 4 counts.
    overrides = [*tiny_overrides(tied_model, tmp_path), "--data.max_prompt_tokens=128"]
    fit(*overrides, config=ARITHMETIC.with_name("own.yaml"))
    metrics = metrics_of(tmp_path)
    assert "val/tiny/mean@4" in metrics
    config = yaml.safe_load((tmp_path / "run" / "version_0" / "config.yaml").read_text())
    assert config["trainer"]["precision"] == "bf16-mixed"


def test_evaluation_sets_have_any_name(tied_model: str, tmp_path: Path) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    held = tmp_path / "heldout.jsonl"
    sets = (
        f"--evaluation.sets={{train: {held}, a.b: {held}, a_b: {held}, c/d: {held}, e@4: {held}}}"
    )
    fit(*overrides, sets, "--trainer.max_epochs=1")
    assert {f"val/{name}/mean@4" for name in ("train", "a.b", "a_b", "c/d", "e@4")} <= set(
        metrics_of(tmp_path)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--rollout.rewards=[sample_rewards.always_raises]", "always_raises.*KeyError"),
        ("--rollout.rewards=[sample_rewards.one_short]", "one_short.*returned 0 rewards for 1"),
        ("--rollout.rewards=[sample_rewards.needs_gold]", "needs_gold.*'gold'.*columns"),
        ("--data.updates_per_epoch=3", "prompts_per_epoch.*4.*updates_per_epoch.*3"),
        ("--data.prompts_per_epoch=100", "prompts_per_epoch=100.*12 prompts"),
        ("--data.train=missing.jsonl", "no file 'missing.jsonl'"),
        ("--data.format.columns={prompt: question}", "no column 'question'.*data.format.columns"),
        ("--data.max_prompt_tokens=1", "every prompt is longer.*max_prompt_tokens=1"),
        ("--rollout.max_new_tokens=100000", "max_new_tokens=100000.*the model takes"),
        ("--evaluation.pass_at=[8]", r"evaluation\.pass_at=.*evaluation\.samples=4"),
        ("--model.objective.divergence=renyi", "renyi.*reverse_kl"),
        ("--evaluation.temperature=-1", "evaluation.temperature=-1"),
        ("--rollout.max_new_tokens=0", "rollout.max_new_tokens=0"),
        ("--model.objective.steps=blank_line", None),
    ],
)
def test_bad_input_stops_before_the_first_update(
    change: str, message: str | None, tied_model: str, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--trainer.num_sanity_val_steps=0"]
    if message is None:  # valid for this tokenizer: a blank line is two line ends
        fit(*overrides, change)
        return
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=f"(?s){message}"):
        fit(*overrides, change)
    assert not list(tmp_path.glob("run/version_0/checkpoints/*"))


def test_json_file_with_one_row_is_data_and_not_configuration(
    tied_model: str, tmp_path: Path
) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "row.jsonl").write_text(json.dumps(rows[0]))
    fit(*overrides, f"--data.train=[{tmp_path}/rows.json, {tmp_path}/row.jsonl]")
    assert "train/loss" in metrics_of(tmp_path)
    fit(*overrides, f"--data.train={tmp_path}/rows.json")
    assert "train/loss" in metrics_of(tmp_path, version=1)


def test_a_training_file_is_not_read_as_a_configuration(tied_model: str, tmp_path: Path) -> None:
    """A JSON file of texts looks like a list of sources."""
    file = tmp_path / "names.json"
    file.write_text(json.dumps(["a.jsonl", "b.jsonl"]))
    with pytest.raises(DataError, match=r"names\.json.*not a JSON object"):
        fit(*tiny_overrides(tied_model, tmp_path), f"--data.train={file}")


def test_empty_training_set_is_an_error(tied_model: str, tmp_path: Path) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    (tmp_path / "empty.json").write_text(json.dumps([]))
    with pytest.raises(Exception, match="empty.json.*no rows"):
        fit(*overrides, f"--data.train={tmp_path / 'empty.json'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.policy=../nowhere", r"model\.policy='\.\./nowhere'.*no such folder"),
        ("--model.policy=some/gated", r"model\.policy='some/gated'.*no entry.*hf auth login"),
        ("--data.train=some/rows", r"data: 'some/rows'.*no network.*Check.*connection"),
        ("--ckpt_path=nowhere.ckpt", r"--ckpt_path nowhere\.ckpt: there is no such.*last"),
        ("--ckpt_path=.", r"--ckpt_path \.: there is no such.*last"),
        ("--trainer.default_root_dir=train.jsonl/a/b", r"default_root_dir=.*jsonl cannot be writ"),
        ("--trainer.accelerator=gpu", r"trainer\.accelerator='gpu'.*no GPU.*cpu"),
        (None, r"no configuration.*--config FILE"),
    ],
)
def test_an_error_of_the_first_evening_is_one_line(
    change: str | None,
    message: str,
    tied_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gated(*_: Any, **__: Any) -> None:
        raise OSError("no entry for you\nMake sure to have access to it")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("prl_lightning.data.sources.load_dataset_builder", offline)
    if change and "gated" in change:
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", gated)
    run = ["--config", str(ARITHMETIC), *without_rewards(tied_model, tmp_path)] if change else []
    said = refused(monkeypatch, tmp_path, "fit", *run, *([change] if change else []))
    assert re.search(message, said)
    assert len(said.removeprefix("prl: The configuration cannot work:\n").splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_has_every_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words)
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted([*LightningCLI.subcommands(), *TOOLS, "check"])


def test_a_new_project_trains_with_its_own_reward(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `prl new` wrote it, with a tiny model and no engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # of another test
    main(["new", "mine"])
    with pytest.raises(FileExistsError, match="folder=mine"):
        main(["new", "mine"])
    assert len(Path("mine/train.jsonl").read_text().splitlines()) == 10
    monkeypatch.chdir("mine")
    small = ["--rollout.max_new_tokens=4", "--trainer.max_epochs=1", "--evaluation.samples=8"]
    small += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    fit(f"--model.policy={tied_model}", "--rollout.sampler=HFSampler", *small, config="own.yaml")
    metrics = read_metrics(Path("runs/own/version_0/metrics.csv"))
    assert metrics["rollout/reward/short_enough"][1] == [1.0]
    assert metrics["rollout/reward"][1] == [pytest.approx(0.1)]


@pytest.mark.parametrize(("word", "hint"), [("fti", "did you mean fit"), ("zzzz", "fit, validate")])
def test_a_command_that_does_not_exist_is_named(word: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"{word}.*{hint}"):
        main([word])
