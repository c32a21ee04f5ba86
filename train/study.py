"""Make the runs of a grid in a YAML file, with tables and plots: `python -m train.study NAME`."""

import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.loop.termination import Termination
from train.settings.config import (
    FIELDS,
    Config,
    check_keys,
    flatten,
    make_config,
    named_yaml,
    nearest,
    parse_flags,
    read_yaml,
)
from train.shared.errors import (
    ConfigError,
    DataError,
    DriverError,
    StorageError,
    TerminatedError,
    guarded,
)

STUDIES = Path(__file__).parent / "studies"
BESIDE_THE_RECIPE = [
    name for name, field in FIELDS.items() if field.metadata["effect"] != "training"
]

USAGE = """\
python -m train.study NAME [--KEY=VALUE[,VALUE ...] ...] [--shard=I/N]

NAME is a file of train/studies, or the path of a YAML file: `title` and `text` for the report,
`common` for the keys of all runs, `runs` for a list of runs with their own keys (`python -m train
--help` lists them); `group` names a folder of runs that several studies share. A list of values of
any key stands for as many runs. Flags override all of them, such as --seed=0,1,2 or
--wd=0.0005,0.001. What is done already is skipped, what was interrupted goes on where it was, and
what diverged is not tried again without --overwrite. --shard=0/4 takes every fourth run, from the
first on: one process or machine for each I, with the same --output_dir. The report is that of
`python -m train.report`.
"""


def expand(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of the values of a layer in which some are lists."""
    values = [v if isinstance(v, list) else [v] for v in layer.values()]
    return [
        dict(zip(layer, combination, strict=True)) for combination in itertools.product(*values)
    ]


def study_configs(
    study: dict[str, Any], name: str, flags: dict[str, str]
) -> tuple[Path, list[Config]]:
    """Return the study's folder, and the configurations of its runs, each with a folder in it.

    Args:
        name: the name of a file of STUDIES, or a path; its last part names the study.

    Raises:
        ConfigError: a key or value is wrong, or two runs differ only in keys that no weight
            depends on.
    """
    name = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    check_keys(flags, "the command line")
    known = ("title", "text", "group", "common", "runs")
    for key in study:
        if key not in known:
            raise ConfigError(
                f"unknown key '{key}' in {name}.yaml: allowed {', '.join(known)}; keys of all runs "
                f"stand under common; nearest {nearest(str(key), known)}"
            )
    folder = Path(flags.get("output_dir", f"runs/{study.get('group', name)}"))
    runs, common = study.get("runs"), study.get("common", {})
    if not isinstance(runs, list) or not runs or not all(isinstance(r, dict) for r in runs):
        raise ConfigError(f"{name}.yaml must hold 'runs', a list of runs with 'key: value' lines")
    if not isinstance(common, dict):
        raise ConfigError(f"common of {name}.yaml must hold 'key: value' lines")
    for key in ("title", "text", "group"):
        if not isinstance(study.get(key, ""), str):
            raise ConfigError(f"{key} of {name}.yaml must be text")
    own_flags: dict[str, Any] = {}
    for key, value in flags.items():
        free = FIELDS[key].type is str and not FIELDS[key].metadata["choices"]
        own_flags[key] = value.split(",") if "," in value and not free else value
    configs: dict[str, Config] = {}
    for number, own in enumerate(runs, 1):
        merged = flatten(common, f"common of {name}.yaml")
        merged |= flatten(own, f"run {number} of {name}.yaml")
        for choice in expand(merged | own_flags):
            config = make_config(("", {**choice, "output_dir": ""}))
            place = str(folder / config.full_name)
            config = replace(config, output_dir=place, resume=not config.overwrite)
            # A flag may make several runs the same, as --rho=0.1 does where the study varies rho.
            same = configs.setdefault(place, config)
            if any(getattr(same, key) != getattr(config, key) for key in BESIDE_THE_RECIPE):
                raise ConfigError(
                    f"{name}.yaml has two runs of the same name, {config.full_name}, that differ "
                    "only in keys that no weight depends on: leave one out"
                )
    return folder, list(configs.values())


def parse_shard(text: str) -> tuple[int, int]:
    """Return (index, number) of `I/N`.

    Raises:
        ConfigError: the text is something else.
    """
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ConfigError(f"shard={text} is not I/N: allowed 0/N to N-1/N; nearest 0/1")
    return int(index), int(number)


def time_left(spent: Sequence[tuple[Config, float]], waiting: Sequence[Config]) -> float | None:
    """Estimate the seconds that the waiting runs will take, by the seconds per epoch of the others.

    A run is estimated by the mean of the runs of its kind or, where there are none, of all runs.
    Return None where no run was timed.
    """
    if not spent:
        return None

    def kind(config: Config) -> tuple[str, str, float]:
        return config.dataset, config.model, config.passes

    total = 0.0
    for config in waiting:
        alike = [pair for pair in spent if kind(pair[0]) == kind(config)] or spent
        rates = [seconds / other.epochs for other, seconds in alike]
        total += config.epochs * sum(rates) / len(rates)
    return total


def main(arguments: Sequence[str]) -> int:
    """Run the study, write its report, and return the exit code of the process."""
    if not arguments or arguments[0].startswith("-"):
        known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
        print(f"{USAGE}\nNAME is one of: {known}")
        return 0 if "--help" in arguments or "-h" in arguments else 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a study is not for torchrun: start one process for each --shard=I/N; torchrun is for "
            "single runs, python -m train"
        )
    name = arguments[0]
    study = read_yaml(named_yaml(name, STUDIES, "study"))
    flags = parse_flags(arguments[1:])
    index, shards = parse_shard(flags.pop("shard", "0/1"))
    folder, configs = study_configs(study, name, flags)
    # These are imported here, so that a typing error is answered before torch is imported.
    from train.loop import cost
    from train.loop.run import diverged_before, finished_result, is_measured, run
    from train.pages import page
    from train.shared.progress import duration, make_console

    console = make_console()
    finished: list[dict[str, Any]] = []
    failed: list[str] = []
    spent: list[tuple[Config, float]] = []
    mine = configs[index::shards]
    if waiting := [c for c in mine if c.overwrite or not (c.folder / "result.json").exists()]:
        console.print(cost.describe(waiting), markup=False, soft_wrap=True)
    for number, config in enumerate(mine):
        label = f"[{number + 1}/{len(mine)}] {config.folder.name}"
        try:
            done = None if config.overwrite else finished_result(config)
            if done is not None and is_measured(config):
                console.print(f"{label}: done already", markup=False, soft_wrap=True)
                finished.append(done)
                spent.append((config, done["figures"]["seconds"]))
                continue
            if not config.overwrite and done is None and (said := diverged_before(config)):
                raise DriverError(f"diverged already ({said}): --overwrite tries again")
            left = time_left(spent, [c for c in mine[number:] if c in waiting or c is config])
            about = "" if left is None else f"  (about {duration(left)} left)"
            console.print(f"{label}{about}", markup=False, soft_wrap=True)
            begun = time.perf_counter()
            finished.append(run(config, console))
            spent.append((config, time.perf_counter() - begun))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"in {label}; the same command goes on there") from None
        except (DataError, StorageError, TerminatedError):
            raise  # no other run will do better
        except DriverError as error:
            # One run that diverges says nothing of the others.
            failed.append(f"{config.folder.name}: {error}")
            console.print(f"failed: {failed[-1]}", markup=False, soft_wrap=True)
    if finished:
        page.print_summary(console, finished)
    if finished or any(folder.rglob("diverged.json")):
        title, text = study.get("title", Path(name).stem), study.get("text", "")
        page.write_report([folder], folder, title, text)
        console.print(f"report.md, tables and plots are in {folder}", soft_wrap=True, markup=False)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    with Termination():
        sys.exit(guarded(main))
