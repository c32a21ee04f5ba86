"""Configuration: files, flags, errors."""

from pathlib import Path
from typing import Any

import pytest

from train.config import (
    EXPERIMENTS,
    FIELDS,
    SECTIONS,
    Config,
    describe_keys,
    from_command_line,
    make_config,
    parse_flags,
    read_yaml,
)
from train.errors import ConfigError
from train.report import PUBLISHED
from train.study import STUDIES, parse_shard, study_configs


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
        Config(opt_name="sgdhess", rho=1, granularity="global", adaptive=True).run_name,
    ]
    expected = ["sgd", "sam-rho0.1", "sam-rho0.1-adaptive", "sammagnitude-rho0.1-global"]
    assert names == [*expected, "sgdhess-rho1"]
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
    assert [c.folder for c in configs] == [
        Path("out/resnet18-sgd-seed0"),
        Path("out/resnet18-sam-rho0.1-seed0"),
    ]


def test_study_errors() -> None:
    with pytest.raises(ConfigError, match="'runs'"):
        study_configs({}, "s", {})
    with pytest.raises(ConfigError, match=r"unknown key 'rhoo' in run 1 of s\.yaml"):
        study_configs({"runs": [{"rhoo": 1}]}, "s", {})
    with pytest.raises(ConfigError, match="two runs of the same name"):
        study_configs({"runs": [{"lr": 1}, {"lr": 2}]}, "s", {})


def test_study_grids() -> None:
    study = {
        "common": {"seed": [0, 1]},
        "runs": [{"opt_name": "sgd"}, {"opt_name": ["sam", "samdirection"], "rho": [0.1, 0.2]}],
    }
    _, configs = study_configs(study, "s", {})
    names = [(c.run_name, c.seed) for c in configs]
    assert len(names) == len(set(names)) == 10
    assert names[:3] == [("sgd", 0), ("sgd", 1), ("sam-rho0.1", 0)]
    # Flags make the grid smaller or larger; what then is the same run is one.
    _, configs = study_configs(study, "s", {"rho": "0.1", "seed": "0,1,2"})
    assert sorted({c.seed for c in configs}) == [0, 1, 2]
    assert len(configs) == 9
    assert all(c.resume for c in configs)
    assert not any(c.resume for c in study_configs(study, "s", {"overwrite": "true"})[1])


PUBLISHED_ROWS = [
    *[f"cifar100_{m}_{o}" for m in ("resnet18", "resnet34", "resnet50", "wrn28_10")
      for o in ("sam", "samdirection", "sammagnitude")],
    "cifar100_resnet18_sgd", "cifar100_resnet18_sgdhess",
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_every_row_of_the_tables_has_a_config(name: str) -> None:
    """The protocol, and of it only model, optimizer and rho changed."""
    config = from_command_line([f"--experiment={name}"])
    _, model, opt_name = name.replace("wrn28_10", "wrn28-10").split("_")
    assert (config.model, config.opt_name) == (model.replace("-", "_"), opt_name)
    protocol = {
        "dataset": "cifar100", "batch_size": 256, "lr": 0.1, "momentum": 0.9, "wd": 0.001,
        "scheduler": "cosine", "epochs": 200, "granularity": "element", "adaptive": False,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in protocol} == protocol
    assert config.rho == {"sgdhess": 0.05, "sgd": 0.05}.get(opt_name, 0.1)


def test_the_configs_are_those_rows() -> None:
    names = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
    assert names == {"default", "default_sam", *PUBLISHED_ROWS}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_is_right(path: Path) -> None:
    folder, configs = study_configs(read_yaml(path), path.stem, {})
    expected = {
        "quickstart": 4, "digits": 39, "fashion": 39, "fashion-small": 13,
        "cifar100-resnet18": 10, "cifar100-resnet34": 9,
        "cifar100-resnet50": 9, "cifar100-wrn28-10": 9, "cifar100-sgdhess": 4, "cifar100-all": 40,
    }  # fmt: skip
    assert len(configs) == expected[path.stem]
    if path.stem.startswith("cifar100"):
        assert folder == Path("runs/cifar100")
        assert {(c.dataset, c.epochs, c.sharpness_batches) for c in configs} == {
            ("cifar100", 200, 40)
        }


def test_the_sweep_has_every_cell_of_the_tables() -> None:
    _, configs = study_configs(named("cifar100-all"), "cifar100-all", {})
    ours = {(c.model, c.opt_name, c.rho) for c in configs}
    tables = read_yaml(PUBLISHED)
    for table in tables.values():
        for model, rows in table.items():
            for opt_name, cells in rows.items():
                for rho in cells if isinstance(cells, dict) else [Config().rho]:
                    assert (model, opt_name, float(rho)) in ours
    # And the other studies share its runs.
    parts = [p.stem for p in STUDIES.glob("cifar100-*.yaml") if p.stem != "cifar100-all"]
    shared = {c.folder for name in parts for c in study_configs(named(name), name, {})[1]}
    assert shared == {c.folder for c in configs}


def named(name: str) -> dict[str, Any]:
    return read_yaml(STUDIES / f"{name}.yaml")


def test_sections_and_paths(tmp_path: Path) -> None:
    config = from_command_line(
        ["--set", "optimizer.rho=0.3", "--set=run.seed=4", "--set", "lr=0.2", "--set",
         "run.verify=7", "--opt_name=sam"]
    )  # fmt: skip
    assert (config.rho, config.seed, config.lr, config.verify_steps) == (0.3, 4, 0.2, 7)
    nested = make_config(
        ("a", {"optimizer": {"rho": 0.3}, "seed": 4, "schedule": {"epochs": 2}}),
        ("b", {"optimizer": {"lr": 0.2}}),
    )
    assert (nested.rho, nested.seed, nested.epochs, nested.lr) == (0.3, 4, 2, 0.2)
    assert all(field.metadata["section"] in SECTIONS for field in FIELDS.values())


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("optimiser.rho=1", ["'optimiser'", "data, network, optimizer", "nearest optimizer"]),
        ("optimizer.rhoo=1", ["'rhoo'", "'optimizer'", "opt_name, rho", "nearest rho"]),
        ("optimizer.epochs=1", ["'epochs'", "nearest schedule.epochs"]),
        ("epoch=1", ["'epoch'", "did you mean 'epochs'"]),
        ("optimizer.rho=-1", ["rho=-1", "0 to 100", "nearest 0"]),
        ("optimizer.rho", ["no value"]),
    ],
)
def test_wrong_paths_are_said(path: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_command_line(["--set", path])
    for part in parts:
        assert part in str(caught.value)


def test_flags_that_stand_alone() -> None:
    config = from_command_line(["--resume", "--compile", "--verify", "3", "--nesterov=false"])
    assert (config.resume, config.compile, config.verify_steps) == (True, True, 3)


def test_sgdhess_cannot_be_compiled() -> None:
    with pytest.raises(ConfigError, match=r"compile=true with opt_name=sgdhess.*allowed false"):
        from_command_line(["--opt_name=sgdhess", "--compile"])


def test_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.config.EXPERIMENTS", tmp_path)
    (tmp_path / "a.yaml").write_text("rho: 0.1\nlr: 0.3\n")
    (tmp_path / "b.yaml").write_text("extends: a\nrho: 0.2\n")
    (tmp_path / "c.yaml").write_text("extends: d\n")
    (tmp_path / "d.yaml").write_text("extends: c\n")
    config = from_command_line(["--experiment=b", "--wd=0"])
    assert (config.rho, config.lr, config.wd) == (0.2, 0.3, 0.0)
    with pytest.raises(ConfigError, match=r"extends itself: c -> d -> c"):
        from_command_line(["--experiment=c"])


def test_what_does_not_matter_is_no_difference() -> None:
    here, there = Config(seed=1, threads=2, resume=True), vars(Config(seed=2, output_dir="x"))
    assert here.differences(there) == ["seed=2 there, 1 here"]


@pytest.mark.parametrize("text", ["", "1", "2/2", "a/2", "-1/2", "1/0"])
def test_wrong_shards_are_said(text: str) -> None:
    with pytest.raises(ConfigError, match="not I/N"):
        parse_shard(text)


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
