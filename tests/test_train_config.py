"""Configuration: files, flags, errors."""

from pathlib import Path
from typing import Any

import pytest

from train.config import FIELDS, Config, describe_keys, from_command_line, parse_flags, read_yaml
from train.errors import ConfigError
from train.study import study_configs


def test_flags_override_the_file_as_in_the_reports_script() -> None:
    config = from_command_line(
        ["--experiment=default_sam", "--opt_name=sammagnitude", "--rho=0.2", "--wd=0.001"]
    )
    assert (config.opt_name, config.rho, config.wd) == ("sammagnitude", 0.2, 0.001)
    # From the file, or the protocol:
    assert (config.dataset, config.model, config.granularity) == ("cifar100", "resnet18", "element")
    assert (config.lr, config.momentum, config.batch_size) == (0.1, 0.9, 256)
    assert (config.epochs, config.scheduler, config.verify_steps) == (200, "cosine", 20)


def test_default_is_the_sgd_baseline() -> None:
    assert from_command_line([]) == from_command_line(["--experiment=default"]) == Config()
    assert Config().opt_name == "sgd"


def test_flag_spellings_and_types() -> None:
    assert parse_flags(["--rho=0.1", "--opt_name", "sam", "--rho", "0.2"]) == {
        "rho": "0.2",
        "opt_name": "sam",
    }
    config = from_command_line(["--adaptive=true", "--wd=1e-3", "--epochs=3"])
    assert (config.adaptive, config.wd, config.epochs) == (True, 1e-3, 3)


def test_yaml_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("wd: 1e-3\nnesterov: yes\n")
    config = Config(**read_yaml(path))
    assert (config.wd, config.nesterov) == (1e-3, True)


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--opt_nam=sam", ["'opt_nam'", "the command line", "'opt_name'", "output_dir"]),
        ("--opt_name=sammagnitde", ["opt_name", "sgd, sam, ", "nearest sammagnitude"]),
        ("--experiment=default_sma", ["default_sma", "nearest default_sam"]),
        ("--rho=-1", ["rho=-1", "0 to 100", "nearest 0"]),
        ("--rho=1000", ["rho=1000", "0 to 100", "nearest 100"]),
        ("--rho=nan", ["rho=nan", "not a number", "0 to 100"]),
        ("--rho=big", ["rho=big", "not a number"]),
        ("--epochs=0", ["epochs=0", "nearest 1"]),
        ("--epochs=2.5", ["epochs=2.5", "not a whole number"]),
        ("--label_noise=1.5", ["label_noise=1.5", "0 to 1", "nearest 1"]),
        ("--adaptive=ture", ["adaptive=ture", "nearest true"]),
        ("--rho", ["--rho has no value"]),
        ("rho=1", ["'rho=1' is no flag"]),
    ],
)
def test_errors_name_key_allowed_and_nearest(flag: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_command_line([flag])
    for part in parts:
        assert part in str(caught.value)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ConfigError, match="nesterov=true needs momentum"):
        Config(nesterov=True, momentum=0.0)


@pytest.mark.parametrize(
    ("content", "part"), [("- 1\n", "must hold"), ("a: [", "cannot be read"), (None, "read")]
)
def test_unusable_files(tmp_path: Path, content: str | None, part: str) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        read_yaml(path)


def test_help_lists_every_key() -> None:
    text = describe_keys()
    assert all(f"--{name}=" in text for name in FIELDS)


def test_run_names_tell_runs_apart() -> None:
    names = [
        Config(opt_name="sgd", rho=0.3).run_name,
        Config(opt_name="sam", rho=0.1, granularity="global").run_name,
        Config(opt_name="sam", rho=0.1, adaptive=True).run_name,
        Config(opt_name="sammagnitude", rho=0.1, granularity="global").run_name,
    ]
    assert names == ["sgd", "sam-rho0.1", "sam-rho0.1-adaptive", "sammagnitude-rho0.1-global"]
    assert Config(dataset="digits").folder == Path("runs/digits-resnet18-sgd-seed0")
    assert Config(output_dir="x").folder == Path("x")


def test_study_layers_and_folders() -> None:
    study = {
        "common": {"rho": 0.1, "epochs": 5},
        "runs": [{"opt_name": "sgd"}, {"opt_name": "sam"}],
    }
    folder, configs = study_configs(study, "s", {"epochs": "2", "output_dir": "out"})
    assert folder == Path("out")
    assert [c.opt_name for c in configs] == ["sgd", "sam"]
    assert [c.epochs for c in configs] == [2, 2]
    assert [c.folder for c in configs] == [Path("out/sgd"), Path("out/sam-rho0.1")]


def test_study_errors() -> None:
    with pytest.raises(ConfigError, match="'runs'"):
        study_configs({}, "s", {})
    with pytest.raises(ConfigError, match=r"unknown key 'rhoo' in run 1 of s\.yaml"):
        study_configs({"runs": [{"rhoo": 1}]}, "s", {})
    with pytest.raises(ConfigError, match="two runs of the same name"):
        study_configs({"runs": [{"seed": 1}, {"seed": 2}]}, "s", {})


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ({"runs": [3]}, "list of runs"),
        ({"runs": [None]}, "list of runs"),
        ({"runs": [{}], "common": [1]}, "common of broken.yaml"),
        ({"runs": [{}], "text": 5}, "text of broken.yaml"),
    ],
)
def test_broken_study_is_an_error_before_any_run(study: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        study_configs(study, "broken", {})
