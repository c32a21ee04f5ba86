"""Group finished runs by all but their seed, and take means, deviations and paired tests over the
seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.settings.config import FIELDS, Config, known_keys, named_value
from train.settings.registry import DATASETS, MODELS, OPTIMIZERS
from train.shared import results
from train.shared.errors import CheckpointError, ConfigError

TITLES = {name: entry.title for name, entry in {**OPTIMIZERS, **MODELS, **DATASETS}.items()}
# Results that do not say how many (classes, test images) there were had these.
TESTED_ON = {"cifar100": (100, 10_000), "digits": (10, 500)}
# Up to rounding, no figure but the times depends on these keys.
ROUNDING = ("backend", "channels_last", "compile", "cuda_graph")
# What the report varies or sets of an optimizer, or what no figure depends on; it uses none of the
# other options.
OF_THE_REPORT = ("opt_name", "rho", "k", "backend", "lr", "momentum", "wd", "nesterov")
OPTIONS = tuple(
    name
    for name, key in FIELDS.items()
    if key.metadata["section"] == "optimizer" and name not in OF_THE_REPORT
)
CONFIDENCE = 0.95
ALL_RUNS = "runs.jsonl"


def title_of(name: str) -> str:
    """Return the name as people write it."""
    return TITLES.get(name, name)


def _rank(name: str) -> int:
    return list(TITLES).index(name) if name in TITLES else len(TITLES)


@dataclass
class Group:
    """Runs that differ in their seed, and in nothing else that their weights depend on.

    config: the configuration of the first run.
    runs: the finished runs, by seed. diverged: the records of runs that diverged.
    label: the optimizer, rho, and the values that tell the group from others of its task.
    """

    config: Config
    runs: list[dict[str, Any]] = field(default_factory=list)
    diverged: list[dict[str, Any]] = field(default_factory=list)
    label: str = ""

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the keys that the weights depend on, without the seed."""
        return {name: value for name, value in self.config.recipe.items() if name != "seed"}

    @property
    def is_of_the_report(self) -> bool:
        """Return whether the optimizer is one of the report's, as the report has it: over SGD,
        perturbing all parameters in every step, by one norm and unscaled."""
        config = self.config
        is_known = config.opt_name in ("sgd", "sgdhess", "sam", "samdirection", "sammagnitude")
        return is_known and all(
            getattr(config, name) == config.usual(name) or not config.uses(name) for name in OPTIONS
        )

    @property
    def optimizer(self) -> str:
        """Return the optimizer's title."""
        return title_of(self.config.opt_name)

    @property
    def variant(self) -> str:
        """Return the label without the optimizer; it is empty if the label has nothing else."""
        return self.label.removeprefix(self.optimizer).removeprefix(", ")

    @property
    def task(self) -> dict[str, Any]:
        """Return the keys that runs must share for their accuracies to compare: model and data."""
        return {name: value for name, value in self.recipe.items() if _is_task(name)}

    @property
    def task_title(self) -> str:
        """Return the task in words."""
        parts = [title_of(self.config.dataset)]
        for name, value in self.task.items():
            if name in ("dataset", "model") or value == FIELDS[name].default:
                continue
            if name == "label_noise":
                parts.append(f"{value:.0%} wrong labels")
            elif name == "train_samples":
                parts.append(f"{value:,} images")
            else:
                parts.append(in_words(name, value))
        return ", ".join([*parts, title_of(self.config.model)])

    @property
    def task_name(self) -> str:
        """Return the task as a part of a file name."""
        config = self.config
        parts = [config.dataset, named_value("model", config.model)]
        for name, value in self.task.items():
            if name not in ("dataset", "model") and value != FIELDS[name].default:
                parts.append(named_value(name, value))
        return "-".join(parts)

    def by_seed(self, name: str) -> dict[int, float]:
        """Return a figure of each run that has it, by its seed; accuracies are in percent."""
        factor = 100 if name.endswith("accuracy") else 1
        return {
            run["config"]["seed"]: factor * run["figures"][name]
            for run in self.runs
            if run["figures"].get(name) is not None
        }

    def values(self, name: str) -> list[float]:
        """Return the figures of by_seed without the seeds."""
        return list(self.by_seed(name).values())

    def history(self, name: str) -> dict[int, list[float]]:
        """Return for each epoch the values of the runs that have this entry of the history."""
        rows: dict[int, list[float]] = {}
        for run in self.runs:
            for entry in run["history"]:
                if entry.get(name) is not None:
                    rows.setdefault(entry["epoch"], []).append(entry[name])
        return dict(sorted(rows.items()))

    def at_epoch(self, name: str, which: int) -> dict[int, float]:
        """Return an entry of the history at one epoch (an index, such as -1), by seed."""
        found = {}
        for run in self.runs:
            value = run["history"][which].get(name) if run["history"] else None
            if value is not None:
                found[run["config"]["seed"]] = value
        return found

    @property
    def remarks(self) -> str:
        """Say what became of runs that did not learn, such as "1 diverged, 2 at chance"."""
        lost = [f"{len(self.diverged)} diverged"] if self.diverged else []
        if chance := sum(is_at_chance(run) for run in self.runs):
            lost.append(f"{chance} at chance")
        return ", ".join(lost)


def _is_task(name: str) -> bool:
    return name == "model" or (FIELDS[name].metadata["section"] == "data" and name != "batch_size")


def in_words(name: str, value: Any) -> str:
    short = FIELDS[name].metadata["short"]
    short = name if short is None else short
    if isinstance(value, bool):
        return short if value else f"no {short}"
    return f"{short} {value:g}".strip() if isinstance(value, float) else f"{short} {value}".strip()


def is_at_chance(run: Mapping[str, Any]) -> bool:
    """Return whether the test accuracy is within two standard deviations of guessing, or below."""
    classes, images = TESTED_ON.get(run["config"].get("dataset", ""), (10, 10_000))
    classes = run.get("classes", classes)
    images = run.get("images", {}).get("test", images)
    chance = 1 / classes
    return bool(
        run["figures"]["test_accuracy"] <= chance + 2 * math.sqrt(chance * (1 - chance) / images)
    )


# -- reading ---------------------------------------------------------------------------------------


def load_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the results below the folders, with the sharpness.json beside each, and the records of
    the runs that diverged.

    In a folder without runs, the runs.jsonl that a report left stands for them.

    Returns:
        the content of each result.json, with density, eigenvalues (of each batch) and settings of
        the sharpness; and the content of each diverged.json.

    Raises:
        ConfigError: a folder is missing, or there is no run in any.
        CheckpointError: a file cannot be read.
    """
    runs = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"there is no folder '{folder}': give folders that hold runs")
        found = sorted([*folder.rglob("result.json"), *folder.rglob("diverged.json")])
        runs += [run for path in found if (run := _load(path)) is not None]
        if not found:
            for path in sorted(folder.rglob(ALL_RUNS)):
                lines = path.read_text(encoding="utf-8").splitlines()
                try:
                    runs += [json.loads(line) for line in lines]
                except ValueError as error:
                    raise CheckpointError(f"'{path}' cannot be read ({error})") from None
    if not runs:
        raise ConfigError(
            f"no complete run (result.json) in {', '.join(map(str, folders))}: run a study first"
        )
    return runs


def _load(path: Path) -> dict[str, Any] | None:
    if path.name == "diverged.json":
        # Beside a result, the record is of a later attempt, which changed nothing there.
        return None if path.with_name("result.json").exists() else results.read_diverged(path)
    run = results.read_result(path)
    run |= {"density": None, "eigenvalues": None, "settings": dict(run["config"])}
    beside = path.with_name("sharpness.json")
    if beside.exists():
        try:
            measured = json.loads(beside.read_text(encoding="utf-8"))
            for name in ("sharpness", "lambda_max", "trace", "trace_error"):
                # train.sharpness may have measured this later than the run did.
                if measured[name] is not None:
                    run["figures"][name] = measured[name]
            run["density"] = measured["density"]
            run["eigenvalues"] = measured.get("eigenvalues")
            run["settings"].update(measured["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{beside}' cannot be read ({error}): run train.sharpness on best.pt again"
            ) from None
    if run["eigenvalues"]:
        run["figures"] |= results.of_all_batches(run["eigenvalues"])
    return run


def grouped(runs: Iterable[dict[str, Any]]) -> tuple[list[Group], list[str]]:
    """Group runs by all keys of the recipe but the seed, and label the groups. Return the groups,
    sorted by data set, model, optimizer and rho, and in words what was left out.

    A run that is in two folders counts once.
    """
    groups: dict[str, Group] = {}
    left_out = []
    for run in runs:
        config = Config(**{**known_keys(run["config"]), "overwrite": False})
        new = Group(config)
        group = groups.setdefault(json.dumps(new.recipe, sort_keys=True), new)
        seed = config.seed
        same = [other for other in group.runs if other["config"]["seed"] == seed]
        if "error" in run:
            is_known = seed in (other["config"]["seed"] for other in group.diverged)
            group.diverged += [] if same or is_known else [run]
        elif not same:
            group.runs.append(run)
            group.diverged = [d for d in group.diverged if d["config"]["seed"] != seed]
        elif same[0]["figures"]["test_accuracy"] != run["figures"]["test_accuracy"]:
            accuracies = [100 * r["figures"]["test_accuracy"] for r in (same[0], run)]
            left_out.append(
                f"{config.full_name} is there twice, with accuracies of {accuracies[0]:.2f} and "
                f"{accuracies[1]:.2f}%: only the first counts"
            )
    ordered = sorted(
        groups.values(),
        key=lambda g: (
            _rank(g.config.dataset), _rank(g.config.model), g.task_name, _rank(g.config.opt_name),
            g.config.opt_name, g.config.rho if g.config.uses("rho") else 0.0, g.config.run_name,
            g.config.full_name,
        ),
    )  # fmt: skip
    for group in ordered:
        group.runs.sort(key=lambda run: run["config"]["seed"])
    for members in tasks(ordered):
        _label(members)
    return ordered, left_out


def tasks(groups: Iterable[Group]) -> list[list[Group]]:
    """Return the groups of each task."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.task_name, []).append(group)
    return list(found.values())


def _compared(group: Group, name: str) -> Any:
    """Return the value of a key; the optimizer's usual value counts as the general default."""
    usual = group.config.usual(name)
    value = group.recipe.get(name, usual)
    return FIELDS[name].metadata["default"] if value == usual else value


def _label(groups: Sequence[Group]) -> None:
    """Label the groups of a task so that the labels tell them apart."""
    differing = [
        name
        for name in FIELDS
        if name not in ("opt_name", "rho") and len({str(_compared(g, name)) for g in groups}) > 1
    ]
    for group in groups:
        parts = [group.optimizer]
        if group.config.uses("rho"):
            parts.append(f"rho {group.config.rho:g}")
        for name in differing:
            value = group.recipe.get(name, group.config.usual(name))
            # Numbers stand in every label; switches, choices and numbers that switch something on
            # where they are not the default.
            is_number = FIELDS[name].type in (int, float) and name in group.recipe
            if (is_number and name not in OPTIONS) or value != group.config.usual(name):
                parts.append(in_words(name, value))
        group.label = ", ".join(parts)


# -- statistics ------------------------------------------------------------------------------------


def mean_and_deviation(values: Sequence[float], form: str = ".2f") -> str:
    """Return text such as 79.24 ± 0.12; without a deviation for one value, - for none."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


@dataclass(frozen=True)
class Comparison:
    """A paired t-test over seeds.

    number: the number of pairs. mean: the mean of the differences. low, high: its 95% interval. p:
    the two-sided p of a mean of 0. The last three are nan where there is only one pair, or the
    differences have no deviation.
    """

    number: int
    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison | None:
    """Compare ours minus theirs, seed by seed: the same seed has the same first weights and order.

    Return None where they have no seed in common.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    number, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(number) if number > 1 else 0.0
    if error == 0:
        return Comparison(number, mean)
    from scipy.stats import t as student  # a run alone is spared this import, which takes a second

    reach = float(student.ppf((1 + CONFIDENCE) / 2, number - 1)) * error
    p = 2 * float(student.sf(abs(mean) / error, number - 1))
    return Comparison(number, mean, mean - reach, mean + reach, p)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p values for their number by Holm's method; nan stays, and counts as no test."""
    order = sorted((p, i) for i, p in enumerate(values) if not math.isnan(p))
    adjusted = [math.nan] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
