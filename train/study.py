"""`python -m train.study NAME`: the runs of train/studies/NAME.yaml, with tables and plots."""

import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.__main__ import guarded
from train.config import (
    FIELDS,
    Config,
    check_keys,
    flatten,
    make_config,
    named_yaml,
    parse_flags,
    read_yaml,
)
from train.errors import ConfigError, DataError, DriverError

STUDIES = Path(__file__).parent / "studies"

USAGE = """\
python -m train.study NAME [--KEY=VALUE[,VALUE ...] ...] [--shard=I/N]

NAME is a file of train/studies: `title` and `text` for the report, `common` for the keys of all
runs, `runs` for a list of runs with their own keys; `group` names a folder of runs that several
studies share. A list of values stands for as many runs. Flags override all of them, such as
--seed=0,1,2. What is done already is skipped, and what was interrupted goes on where it was.
--shard=0/4 takes every fourth run, from the first on: one process or machine for each I, with the
same --output_dir. The report is that of `python -m train.report`.
"""


def expand(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of a layer in which some are lists."""
    values = [v if isinstance(v, list) else [v] for v in layer.values()]
    return [
        dict(zip(layer, combination, strict=True)) for combination in itertools.product(*values)
    ]


def study_configs(
    study: dict[str, Any], name: str, flags: dict[str, str]
) -> tuple[Path, list[Config]]:
    """The study's folder and the configuration of each run, whose results go into folders there.

    Raises:
        ConfigError: a key or value is wrong.
    """
    check_keys(flags, "the command line")
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
    configs = []
    for number, own in enumerate(runs, 1):
        merged = flatten(common, f"common of {name}.yaml")
        merged |= flatten(own, f"run {number} of {name}.yaml")
        for choice in expand(merged | own_flags):
            config = make_config(("", choice))
            place = folder / f"{config.model}-{config.run_name}-seed{config.seed}"
            layer = {**choice, "output_dir": str(place), "resume": not config.overwrite}
            config = make_config(("", layer))
            # A flag may make several runs one: --rho=0.1 of all rho.
            if config not in configs:
                configs.append(config)
    places = [config.output_dir for config in configs]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ConfigError(
            f"{name}.yaml has two runs of the same name, {Path(twice).name}: model, optimizer, rho "
            "and seed tell runs apart; write two studies"
        )
    return folder, configs


def parse_shard(text: str) -> tuple[int, int]:
    """(index, number) of `I/N`.

    Raises:
        ConfigError: it is something else.
    """
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ConfigError(f"shard={text} is not I/N: allowed 0/N to N-1/N; nearest 0/1")
    return int(index), int(number)


def time_left(spent: Sequence[tuple[Config, float]], waiting: Sequence[Config]) -> float | None:
    """Seconds that the waiting runs will take: as those of their kind did, per epoch.

    Of another kind: as the mean of all did. None where no run tells.
    """
    if not spent:
        return None

    def kind(config: Config) -> tuple[str, str, str]:
        one_pass = ("sgd", "sgdhess")
        cost = config.opt_name if config.opt_name in one_pass else "two passes"
        return config.dataset, config.model, cost

    total = 0.0
    for config in waiting:
        alike = [pair for pair in spent if kind(pair[0]) == kind(config)] or spent
        rates = [seconds / other.epochs for other, seconds in alike]
        total += config.epochs * sum(rates) / len(rates)
    return total


def main(arguments: Sequence[str]) -> int:
    """Run the study and write its report; the exit code of the process."""
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
    # Here, so that a typing error is answered before torch is imported.
    from train import report, results
    from train.progress import duration, make_console
    from train.run import finished_result, run

    console = make_console()
    finished: list[dict[str, Any]] = []
    failed: list[str] = []
    spent: list[tuple[Config, float]] = []
    mine = configs[index::shards]
    for number, config in enumerate(mine):
        label = f"[{number + 1}/{len(mine)}] {config.folder.name}"
        try:
            done = None if config.overwrite else finished_result(config)
            if done is not None:
                console.print(f"{label}: done already", markup=False, soft_wrap=True)
                finished.append(done)
                spent.append((config, done["figures"]["seconds"]))
                continue
            left = time_left(spent, mine[number:])
            about = "" if left is None else f"  (about {duration(left)} left)"
            console.print(f"{label}{about}", markup=False, soft_wrap=True)
            begun = time.perf_counter()
            finished.append(run(config, console))
            spent.append((config, time.perf_counter() - begun))
        except DataError:
            raise  # no run of the data set will do better
        except DriverError as error:
            # One run that diverges says nothing of the others.
            failed.append(f"{config.folder.name}: {error}")
            console.print(f"failed: {failed[-1]}", markup=False, soft_wrap=True)
    if finished:
        results.print_table(console, finished)
        title, text = study.get("title", name), study.get("text", "")
        report.write_report([folder], folder, title, text)
        console.print(f"report.md, tables and plots are in {folder}", soft_wrap=True, markup=False)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
