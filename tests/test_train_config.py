"""Configuration: files, flags, errors."""

import re
from pathlib import Path
from typing import Any

import pytest

from train.pages.page import PUBLISHED
from train.settings.config import (
    EXPERIMENTS,
    FIELDS,
    SECTIONS,
    Config,
    describe_keys,
    folders_and_flags,
    from_command_line,
    make_config,
    named_value,
    named_yaml,
    parse_flags,
    read_yaml,
)
from train.settings.registry import OPTIMIZERS
from train.shared.errors import ConfigError
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
        ("--opt_name=sammagnitde", ["opt_name", "sgd, sgdhess, sam, ", "nearest sammagnitude"]),
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


def of_family(key: str) -> str:
    """An optimizer that uses the key, SAM if it does."""
    name, values = FIELDS[key].metadata["used_if"] or ("", ())
    if not name:
        return "sgd"
    return "sam" if name != "opt_name" or "sam" in values else str(values[0])


# A value that differs from the default, for every key that the weights depend on.
OTHER_VALUES = {
    "dataset": "digits", "label_noise": 0.25, "train_samples": 500, "batch_size": 64,
    "model": "resnet34", "precision": "bf16", "channels_last": True, "compile": True,
    "cuda_graph": True, "opt_name": "sam", "rho": 0.125, "adaptive": True, "granularity": "global",
    "k": 7, "backend": "foreach", "lr": 0.05, "momentum": 0.5, "wd": 0.0005, "nesterov": True,
    "scheduler": "exponential", "lr_gamma": 0.5, "epochs": 3, "seed": 4, "image_size": 64,
    "augmentation": False, "label_noise_kind": "asymmetric", "label_noise_file": "wrong.npy",
    "base": "adamw", "perturbation": "local", "perturbation_group": 2, "warmup_epochs": 2,
    "label_smoothing": 0.1, "scaling": "tensor", "eta": 0.5, "subset": "norm", "norm": "none",
    "when": "periodic:10", "alpha": 0.25, "gamma": 0.5, "decouple": False, "max_norm": 2.0,
    "normed": True, "sigma": 0.5, "lmbda": 0.5, "theta": 0.5, "a": 0.5, "rho_end": 0.5,
    "sparsity": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if f.metadata["effect"] == "training"]
)
def test_every_key_that_matters_has_a_part_in_the_folders_name(name: str) -> None:
    base = {
        "k": {"opt_name": "sgdhess"},
        "lr_gamma": {"scheduler": "exponential"}, "compile": {"opt_name": "sam"},
        "image_size": {"dataset": "folder"}, "label_noise_kind": {"label_noise": 0.2},
        "perturbation_group": {"opt_name": "sam", "perturbation": "group", "perturbation_group": 4},
    }.get(name, {"opt_name": of_family(name)})  # fmt: skip
    value = OTHER_VALUES[name]
    plain, other = Config(**base), Config(**{**base, name: value})
    assert plain.folder != other.folder
    assert other.differences(vars(plain)) and name in other.differences(vars(plain))[0]
    # And two values of it are two names.
    if isinstance(value, float):
        assert Config(**{**base, name: value / 2}).folder != other.folder


def test_keys_out_of_use_and_keys_that_measure_part_nothing() -> None:
    plain = Config()
    for keys in (
        {"rho": 0.3, "granularity": "global", "adaptive": True, "k": 3, "backend": "foreach"},
        {"alpha": 0.2, "when": "from:3", "subset": "norm", "norm": "tensor", "theta": 0.5},
        {"lr_gamma": 0.5},
        {"test_every": 1, "log_every": 0, "group": "a", "tags": "b,c"},
        {"verify_steps": 0, "statistics_every": 5, "sharpness_samples": 0, "sharpness_batches": 4},
        {"threads": 1, "device": "cpu", "data_root": "x", "framework_name": "wandb"},
    ):
        other = Config(**keys)
        assert other.folder == plain.folder and other.differences(vars(plain)) == []


def test_class_folders_are_known_by_their_name(tmp_path: Path) -> None:
    one, same, other = (
        Config(dataset="folder", data_root=str(tmp_path / place))
        for place in ("a/tiny", "b/tiny", "a/flowers")
    )
    assert one.folder.name == "folder-resnet18-sgd-tiny-seed0"
    assert one.differences(vars(same)) == [] and one.folder == same.folder
    assert one.differences(vars(other)) == ["data_root=flowers there, tiny here"]
    assert one.folder != other.folder


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"label_noise": 0.2, "label_noise_file": "x"}, "label_noise=0.2 with a label_noise_file"),
        ({"image_size": 64}, "image_size=64 with dataset=cifar100, .*or dataset=folder"),
        ({"base": "adamw"}, "base=adamw with opt_name=sgd, .*opt_name=adamw is adamw by itself"),
        ({"perturbation": "local"}, "perturbation=local with opt_name=sgd"),
        ({"opt_name": "sam", "perturbation": "group"}, "perturbation_group=0: allowed group with"),
        ({"opt_name": "sam", "perturbation_group": 2}, "perturbation=global with perturbation_gro"),
        ({"warmup_epochs": 3, "epochs": 3}, "warmup_epochs=3 of epochs=3 .*nearest 2"),
        (
            {"opt_name": "looksam", "when": "periodic:2"},
            "when=periodic:2 with opt_name=looksam, whose k says in which steps .*allowed always",
        ),
        ({"model": "tim:resnet18"}, "model=tim:resnet18 is not known: allowed .*timm:NAME"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(**keys)


@pytest.mark.parametrize("given", ["--time=true", "--time true"])
def test_folders_and_flags(given: str) -> None:
    words = ["a", *given.split(), "--output_dir", "there", "b"]
    folders, flags = folders_and_flags(words, {"time": "true", "output_dir": "DIR"})
    assert folders == [Path("a"), Path("b")]
    assert flags == {"time": "true", "output_dir": "there"}


def test_a_preset_is_its_keys_and_what_follows_overrides_it() -> None:
    config = from_command_line(["--preset=bf16", "--opt_name=sam"])
    assert (config.precision, config.channels_last) == ("bf16", True)
    assert not from_command_line(["--preset=bf16", "--channels_last=false"]).channels_last
    with pytest.raises(ConfigError, match="preset=bf61 is not known: allowed bf16; nearest bf16"):
        from_command_line(["--preset=bf61"])
    _, (one,) = study_configs({"runs": [{}]}, "s", parse_flags(["--preset=bf16"]))
    assert one.precision == "bf16"


def test_names_are_file_names() -> None:
    assert named_value("wd", 1e-5) == "wd1e-05" and named_value("nesterov", False) == "no-nesterov"
    one, other = named_value("output_dir", "a/b c"), named_value("output_dir", "a_b_c")
    assert one.startswith("output_dira_b_c-") and other == "output_dira_b_c"
    alone = {"compile": False, "image_size": 0, "label_noise_file": "", "perturbation_group": 0}
    many = Config(**{**OTHER_VALUES, **alone, "opt_name": "sammagnitude"})
    assert len(many.folder.name) < 256 and many.folder.name.endswith("-seed4")


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
        Path("out/cifar100-resnet18-sgd-epochs2-seed0"),
        Path("out/cifar100-resnet18-sam-rho0.1-epochs2-seed0"),
    ]


def test_study_errors() -> None:
    with pytest.raises(ConfigError, match="'runs'"):
        study_configs({}, "s", {})
    with pytest.raises(ConfigError, match=r"unknown key 'rhoo' in run 1 of s\.yaml"):
        study_configs({"runs": [{"rhoo": 1}]}, "s", {})
    with pytest.raises(
        ConfigError, match=r"two runs of the same name.*only in keys that no weight"
    ):
        study_configs({"runs": [{"statistics_every": 1}, {"statistics_every": 2}]}, "s", {})
    with pytest.raises(ConfigError, match=r"unknown key 'epochs' in s.yaml.*common"):
        study_configs({"runs": [{}], "epochs": 3}, "s", {})


def test_studies_sweep_any_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "common: {schedule: {epochs: [1, 2]}, model: resnet_small}\n"
        "runs:\n"
        "- {lr: [0.1, 0.2], wd: [0, 1e-3], dataset: [digits, fashion], label_noise: [0, 0.2]}\n"
        "- {opt_name: sgdhess, k: [1, 5], scheduler: [cosine, constant]}\n"
    )
    folder, configs = study_configs(read_yaml(path), str(path), {"precision": "fp32,bf16"})
    assert folder == Path("runs/mine")
    assert len(configs) == len({config.folder for config in configs}) == 2 * (2 * 16 + 2 * 4)
    assert named_yaml(str(path), STUDIES, "study") == path
    with pytest.raises(ConfigError, match=r"no file '.*other.yaml'"):
        named_yaml(str(tmp_path / "other.yaml"), STUDIES, "study")


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
        "cost-grid": 86, "cost-noise": 140, "cost-clean": 140, "cifar100-small": 21,
        "cifar100-resnet18": 10, "cifar100-resnet34": 9,
        "cifar100-resnet50": 9, "cifar100-wrn28-10": 9, "cifar100-sgdhess": 4, "cifar100-all": 40,
    }  # fmt: skip
    assert len(configs) == expected[path.stem]
    if path.stem.startswith("cifar100") and path.stem != "cifar100-small":
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
    parts = {p.stem for p in STUDIES.glob("cifar100-*.yaml")} - {"cifar100-all", "cifar100-small"}
    shared = {c.folder for name in parts for c in study_configs(named(name), name, {})[1]}
    assert shared == {c.folder for c in configs}


def named(name: str) -> dict[str, Any]:
    return read_yaml(STUDIES / f"{name}.yaml")


def test_sections_and_paths() -> None:
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
        ("optimizer.rhoo=1", ["'rhoo'", "'optimizer'", "opt_name, base", "nearest rho"]),
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


REPORTS_YAML = """
dataloader: {data_name: cifar100, batch_size: 128, num_workers: 16, split: [0.9, 0.1]}
model: {model_name: resnet34}
optimizer:
  opt_name: sgdhess
  opt_hyperparameter: {lr: 0.2, momentum: 0.8, weight_decay: 0.0005, rho: 0.3, k: 10}
scheduler:
  sch_name: cosine
  sch_hyperparameter: {T_max: 50}
trainer: {epochs: 50, seed: 42}
logging: {framework_name: tensorboard, project_name: mine}
"""


def test_the_reports_files_and_command_line(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(REPORTS_YAML)
    config = from_command_line([f"--experiment={tmp_path / 'theirs.yaml'}"])
    assert config == Config(
        batch_size=128, model="resnet34", opt_name="sgdhess", lr=0.2, momentum=0.8, wd=0.0005,
        rho=0.3, k=10, epochs=50, seed=42, framework_name="tensorboard", project_name="mine",
    )  # fmt: skip
    # As its README prints it, with the flags that it has besides.
    config = from_command_line(
        ["--experiment=default_sam", "--opt_name=sammagnitude", "--rho=0.2", "--wd=0.001",
         "--project_name=CIFAR100-SAM", "--framework_name=wandb", "--model_name=wrn28_10",
         "--adaptive=True"]
    )  # fmt: skip
    assert (config.model, config.rho, config.adaptive) == ("wrn28_10", 0.2, True)
    assert (config.project_name, config.framework_name) == ("CIFAR100-SAM", "wandb")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("T_max: 50", "T_max: 40", "T_max=40 .*epochs: 50"),
        ("[0.9, 0.1]", "[0.8, 0.2]", r"split=\[0.8, 0.2\] .*\[0.9, 0.1\]"),
        ("rho: 0.3", "rhoo: 0.3", "unknown key 'rhoo'"),
        ("trainer:", "traner:", "unknown section 'traner'"),
    ],
)
def test_what_the_reports_files_may_not_say(tmp_path: Path, old: str, new: str, says: str) -> None:
    (tmp_path / "theirs.yaml").write_text(REPORTS_YAML.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        from_command_line([f"--experiment={tmp_path / 'theirs.yaml'}"])


def test_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.settings.config.EXPERIMENTS", tmp_path)
    (tmp_path / "a.yaml").write_text("rho: 0.1\nlr: 0.3\n")
    (tmp_path / "b.yaml").write_text("extends: a\nrho: 0.2\n")
    (tmp_path / "c.yaml").write_text("extends: d\n")
    (tmp_path / "d.yaml").write_text("extends: c\n")
    config = from_command_line(["--experiment=b", "--wd=0"])
    assert (config.rho, config.lr, config.wd) == (0.2, 0.3, 0.0)
    with pytest.raises(ConfigError, match=r"extends itself: c -> d -> c"):
        from_command_line(["--experiment=c"])
    # Files elsewhere extend those by name, and their neighbours by path.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.yaml").write_text("extends: b\nwd: 0\n")
    (tmp_path / "elsewhere" / "f.yaml").write_text("extends: e.yaml\nlr: 0.4\n")
    config = from_command_line([f"--experiment={tmp_path / 'elsewhere' / 'f.yaml'}"])
    assert (config.rho, config.lr, config.wd) == (0.2, 0.4, 0.0)


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


def test_rows_of_optimizers_agree_with_their_classes() -> None:
    """Own keys are all that the class has, and their defaults its own."""
    for name, row in OPTIMIZERS.items():
        if row.step in ("plain", "hessian"):
            continue
        config, own = Config(opt_name=name), row.make.own_options
        assert set(row.keys) == set(own) and config.rho == row.make.default_rho, name
        for key in row.keys:
            assert getattr(config, key) == (own[key].default or 0), (name, key)
            assert config.uses(key) and not Config().uses(key)
    assert (Config(opt_name="asam").eta, Config().eta) == (0.01, 0.0)
    assert Config(opt_name="gsam", alpha=0.2).run_name == "gsam-rho0.05-alpha0.2"
    assert Config(opt_name="gsam", alpha=0.4).run_name == "gsam-rho0.05"
    # It is the value that counts, and not whether it was written down.
    saved = vars(Config(opt_name="looksam"))
    assert Config(opt_name="looksam", k=10).differences(saved) == []
    assert Config(opt_name="looksam", k=5).differences(saved) == ["k=10 there, 5 here"]


@pytest.mark.parametrize(
    ("when", "policy"),
    [("always", None), ("periodic:10", ("periodic", 10)), ("from:300", ("from", 300)),
     ("bernoulli:0.50", ("bernoulli", 0.5)), ("norm:0.5:-1", ("norm", 0.5, -1))],
)  # fmt: skip
def test_when_is_read(when: str, policy: Any) -> None:
    config = Config(opt_name="sam", when=when)
    assert config.policy == policy
    assert Config(opt_name="sam", when=config.when) == config


@pytest.mark.parametrize(
    "when",
    ["", "never", "periodic", "periodic:0", "from:-1", "bernoulli:2", "norm:1", "norm:1:nan"],
)
def test_a_wrong_when_is_said(when: str) -> None:
    with pytest.raises(ConfigError, match=f"when={when} is not known: allowed always.*nearest"):
        Config(opt_name="sam", when=when)


def test_folders_of_the_driver_read_those_below_them_only() -> None:
    order = ["shared", "settings", "inputs", "models", "spectrum", "pages", "loop"]
    train = Path(__file__).parents[1] / "train"
    read = {
        (path.parent.name, other)
        for path in train.glob("*/*.py")
        for other in re.findall(r"(?:from|import) train\.(\w+)", path.read_text())
    }
    assert {folder for pair in read for folder in pair} == {*order}
    assert all(order.index(other) <= order.index(folder) for folder, other in read)
