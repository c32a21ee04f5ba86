"""Compare accuracy with what it costs, and choose radii by validation: `python -m train.worth
DIR...`."""

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from train.inputs.data import train_batches
from train.loop.cost import evaluations, passes
from train.loop.run import Training
from train.pages.claims import LEVEL, interval, p_in_words, verdict
from train.pages.groups import Comparison, Group, grouped, holm, in_words, load_runs, paired, tasks
from train.pages.plots import MARKERS, style_of
from train.pages.tables import markdown
from train.settings.config import FIELDS, folders_and_flags
from train.settings.registry import OPTIMIZERS
from train.shared import results
from train.shared.devices import set_numerics
from train.shared.errors import CheckpointError, ConfigError, guarded

USAGE = """\
python -m train.worth DIR [DIR ...] [--time=true] [--output_dir=DIR]

Of the runs below the folders: accuracy after the last epoch and at the best validation epoch,
against gradient evaluations and against seconds, each optimizer against SGD, also against SGD that
trained for longer, and against SAM; and of several radii, the one that validation chooses. Writes
worth.md and worth.png into --output_dir (default: the first DIR). Seconds are steps times the time
of a step, from steps.json in that folder: --time=true measures it, for which the data must be
there.
"""
STEPS = "steps.json"
ROUNDS, STEPS_EACH = 12, 10  # optimizers take turns, so that a busy minute slows down all of them

LAST, BEST, NOISY = "last epoch", "best epoch", "by wrong labels"
NOTES = f"""\
- last epoch: test accuracy after it, in percent. best epoch: test accuracy at the epoch with the
  best validation accuracy. by wrong labels: accuracy on the right validation labels at the epoch
  that validation labels as wrong as those of training would choose. 95% intervals over the seeds.
- gradients: of an image's loss with respect to the weights, in thousands; two for an image of a
  step with two passes. s: steps times the time of a step measured alone.
- points more: mean over the seeds that both have, and its 95% interval, by a paired
  t-test. Statements rest on the smallest of the differences in a row: "more" and "less" are said
  where its p, adjusted by Holm's method for the rows, is below {LEVEL}, and all have one sign."""


def short_labels(members: Sequence[Group], with_rho: bool = True) -> list[str]:
    """Return labels that tell a task's groups apart, without values that are usual or most have."""
    most = {
        name: Counter(str(g.recipe.get(name)) for g in members).most_common(1)[0][0]
        for name in FIELDS
    }
    labels = []
    for group in members:
        parts = [group.optimizer]
        if with_rho and group.config.uses("rho"):
            parts.append(f"rho {group.config.rho:g}")
        parts += [
            in_words(name, value)
            for name, value in group.recipe.items()
            if name not in ("opt_name", "rho")
            and value != group.config.usual(name)
            and str(value) != most[name]
        ]
        labels.append(", ".join(parts))
    return labels


# -- cost ------------------------------------------------------------------------------------------


def planned(group: Group) -> tuple[int, float]:
    """Return the number of steps of a run, and the gradients that a step takes on average."""
    config, images = group.config, group.runs[0]["images"]["train"]
    steps = config.epochs * config.steps_per_epoch(images)
    return steps, passes(config, steps)


def gradients(group: Group) -> float:
    """Return the gradient evaluations of one image that a run takes."""
    return evaluations(group.config, group.runs[0]["images"]["train"])[0]


def _key(group: Group) -> str:
    """Return the key of a group's step times: data set, network and how it runs, batch size, and
    run_name without rho, on which they do not depend."""
    config = group.config
    name = config.run_name.replace(f"-rho{config.rho:g}", "", 1)
    network = config.model + config.departures("network", ("model",))
    return f"{config.dataset}-{network}-batch{config.batch_size}-{name}"


def seconds(group: Group, steps: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the seconds of a run's steps, by the times of steps with one and with two passes; None
    where these are not known."""
    known = steps.get(_key(group))
    if known is None:
        return None
    number, average = planned(group)
    second = average - 1 if OPTIMIZERS[group.config.opt_name].step == "two passes" else 0.0
    parts = (("1", 1 - second), ("2", second))
    if any(share and name not in known for name, share in parts):
        return None
    return number * sum(share * known[name] for name, share in parts if share) / 1000


def time_steps(groups: Sequence[Group], data_root: str = "") -> dict[str, dict[str, float]]:
    """Return the median times, in ms, of steps with one and with two passes, by _key.

    On a CPU and with one thread, this is processor time, which other processes hardly change.
    """
    trainings: dict[str, tuple[Training, dict[str, list[float]]]] = {}
    for group in groups:
        config = replace(
            group.config, verify_steps=0, epochs=max(2, group.config.epochs), label_noise=0.0,
            data_root=data_root or group.config.data_root,
            # Both kinds of steps must occur in the few steps that are timed.
            when="periodic:2" if group.config.policy else "always",
        )  # fmt: skip
        if _key(group) not in trainings:
            trainings[_key(group)] = Training(config), {}
    for number in range(ROUNDS):
        for training, times in trainings.values():
            _take_steps(training, number, times)
    return {
        key: {kind: statistics.median(values) for kind, values in times.items()}
        for key, (_, times) in trainings.items()
    }


def _take_steps(training: Any, number: int, times: dict[str, list[float]]) -> None:
    config, device = training.config, training.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        # The processor time of several threads would be their sum.
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    set_numerics(config.precision, config.threads)  # of the process: several trainings take turns
    training.model.train()
    batches = train_batches(training.dataset, config.batch_size, config.seed, number + 1)
    for _, (images, labels) in zip(range(STEPS_EACH), batches, strict=False):
        began = now()
        taken, _predicted = training.take_step(images, labels, len(labels), False, [])
        times.setdefault(str(len(taken)), []).append(1000 * (now() - began))
        training.done += 1


# -- tables ----------------------------------------------------------------------------------------


def by_wrong_labels(group: Group) -> dict[int, float]:
    """Return validation accuracy, in percent, at the epoch that wrong labels choose, by seed."""
    found = {}
    for run in group.runs:
        known = [entry for entry in run["history"] if "val_noisy_accuracy" in entry]
        if known:
            best = max(known, key=lambda entry: entry["val_noisy_accuracy"])
            found[run["config"]["seed"]] = 100 * best["val_accuracy"]
    return found


def measures(group: Group) -> dict[str, dict[int, float]]:
    """Return the three accuracies, by seed, without those that no run has."""
    found = {
        LAST: group.by_seed("last_test_accuracy"),
        BEST: group.by_seed("test_accuracy"),
        NOISY: by_wrong_labels(group),
    }
    return {name: values for name, values in found.items() if values}


def mean_interval(values: Mapping[int, float]) -> Comparison | None:
    """Return the mean and its 95% interval; None where there are no values."""
    return paired(values, dict.fromkeys(values, 0.0))


def _in_brackets(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    mean = f"{comparison.mean:.1f}"
    if math.isnan(comparison.low):
        return mean
    return f"{mean} [{comparison.low:.1f}, {comparison.high:.1f}]"


def accuracy_table(
    members: Sequence[Group], steps: Mapping[str, Mapping[str, float]]
) -> list[list[str]]:
    """Return a row for each group, sorted by gradients; head first."""
    names = [name for name in (LAST, BEST, NOISY) if any(name in measures(g) for g in members)]
    rows = []
    for label, group in zip(short_labels(members), members, strict=True):
        known = measures(group)
        cells = [_in_brackets(mean_interval(known.get(name, {}))) for name in names]
        spent = seconds(group, steps)
        took = "-" if spent is None else f"{spent:.1f}"
        row = [label, str(len(group.runs)), f"{gradients(group) / 1000:.0f}", took, *cells]
        rows.append((gradients(group), row))
    rows.sort(key=lambda row: row[0])
    return [["optimizer", "seeds", "gradients", "s", *names], *(row for _, row in rows)]


def smallest(differences: Iterable[Comparison]) -> tuple[Comparison, bool]:
    """Return the smallest difference, on which statements rest, and whether all have its sign."""
    found = sorted(differences, key=lambda comparison: abs(comparison.mean))
    return found[0], all(other.mean * found[0].mean > 0 for other in found)


def difference_table(members: Sequence[Group], plain: Group) -> list[list[str]]:
    """Return the accuracies of every other group minus those of `plain`, head first; return []
    where no other group has a seed in common."""
    theirs = measures(plain)
    found = []
    for label, group in zip(short_labels(members), members, strict=True):
        if group is plain:
            continue
        compared = {
            name: comparison
            for name, values in measures(group).items()
            if (comparison := paired(values, theirs.get(name, {}))) is not None
        }
        if compared:
            found.append((label, compared, *smallest(compared.values())))
    adjusted = holm([least.p for _, _, least, _ in found])
    rows = []
    for (label, compared, least, agree), p in zip(found, adjusted, strict=True):
        said = verdict(least, p, 0)
        if said in ("more", "less") and not agree:
            said = "depends on the epoch"
        cells = [interval(compared[name]) if name in compared else "-" for name in theirs]
        rows.append([label, *cells, str(least.number), p_in_words(p), said])
    return [["optimizer", *theirs, "n", "p", "verdict"], *rows] if rows else []


def chosen(members: Sequence[Group]) -> list[list[str]]:
    """Return a row for groups that differ in rho alone, with the rho of the best validation
    accuracy, head first; return [] where there are no such groups."""
    families: dict[str, list[tuple[str, Group]]] = {}
    labels = short_labels(members, with_rho=False)
    for label, group in zip(labels, members, strict=True):
        if group.config.uses("rho") and group.runs:
            rest = {name: value for name, value in group.recipe.items() if name != "rho"}
            families.setdefault(str(rest), []).append((label, group))
    rows = []
    for family in families.values():
        if len(family) < 2:
            continue
        ordered = sorted((group for _, group in family), key=lambda group: group.config.rho)
        means = [statistics.fmean(group.values("best_val_accuracy")) for group in ordered]
        best = means.index(max(means))
        at_end = "at an end of the grid" if best in (0, len(means) - 1) else ""
        grid = ", ".join(
            f"{group.config.rho:g}: {mean:.2f}" for group, mean in zip(ordered, means, strict=True)
        )
        rows.append([family[0][0], grid, f"{ordered[best].config.rho:g}", at_end])
    head = ["optimizer", "best validation accuracy by rho, %", "chosen", ""]
    return [head, *rows] if rows else []


# -- the plot --------------------------------------------------------------------------------------


def _beside(places: Sequence[float]) -> list[float]:
    """Return the places, with those that coincide moved side by side."""
    span = (max(places) - min(places)) or 1.0
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    while order:
        alike = [i for i in order if places[i] - places[order[0]] < 0.01 * span]
        for number, index in enumerate(alike):
            moved[index] += 0.028 * span * (number - (len(alike) - 1) / 2)
        order = order[len(alike) :]
    return moved


def plot(parts: Sequence[Sequence[Group]], steps: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw a row of panels for each task: accuracy over gradients and, if all are known, over
    seconds."""
    costs = {"gradients of an image, thousands": [[gradients(g) / 1000 for g in m] for m in parts]}
    took = [[seconds(g, steps) for g in m] for m in parts]
    if all(value is not None for values in took for value in values):
        costs["seconds of steps"] = [[value or 0.0 for value in values] for values in took]
    labels = list(
        dict.fromkeys(label for members in parts for label in short_labels(members, with_rho=False))
    )
    names = {
        label: group.config.opt_name
        for members in parts
        for label, group in zip(short_labels(members, with_rho=False), members, strict=True)
    }
    marks, used = {}, Counter[str]()
    for label in sorted(labels, key=len):  # the shortest label gets the optimizer's own marker
        style = style_of(names[label])
        turn = used[names[label]]
        used[names[label]] += 1
        index = MARKERS.index(style["marker"])
        marks[label] = {**style, "marker": MARKERS[(index + 3 * turn) % len(MARKERS)]}
    figure = Figure(figsize=(4.6 * len(costs) + 2.6, 3.6 * len(parts) + 0.5), layout="constrained")
    grid = figure.subplots(len(parts), len(costs), squeeze=False, sharey="row", sharex="col")
    handles: dict[str, Any] = {}
    for number, (row, members) in enumerate(zip(grid, parts, strict=True)):
        ours = short_labels(members, with_rho=False)
        for axes, of_parts in zip(row, costs.values(), strict=True):
            places = _beside(of_parts[number])
            for label, group, x in zip(ours, members, places, strict=True):
                for name, face in ((BEST, None), (LAST, "none")):
                    mean = mean_interval(measures(group).get(name, {}))
                    if mean is None:
                        continue
                    reach = None if math.isnan(mean.low) else mean.high - mean.mean
                    line = axes.errorbar(
                        x, mean.mean, reach, **marks[label], linestyle="", capsize=2,
                        markersize=6, elinewidth=0.9, markerfacecolor=face,
                    )  # fmt: skip
                    if name == BEST:
                        handles.setdefault(label, line)
            axes.grid(alpha=0.3)
            axes.set_title(members[0].task_title, fontsize="small", loc="left")
        row[0].set_ylabel("test accuracy, %")
    for axes, words in zip(grid[-1], costs, strict=True):
        axes.set_xlabel(words)
    figure.legend(
        list(handles.values()), list(handles), loc="outside right upper", fontsize="small",
        title="filled: best validation epoch\nhollow: last epoch\nbars: 95% intervals",
        title_fontsize="small", alignment="left",
    )  # fmt: skip
    return figure


# -- the page --------------------------------------------------------------------------------------


def write_worth(
    sources: Sequence[Path], folder: Path, is_timing: bool = False, data_root: str = ""
) -> Path:
    """Write worth.md, worth.png and, where steps are timed, steps.json.

    Returns:
        the path of worth.md.
    """
    groups = [group for group in grouped(load_runs(sources))[0] if group.runs]
    if not groups:
        raise ConfigError("no run has finished: there is nothing to compare")
    folder.mkdir(parents=True, exist_ok=True)
    path, known = folder / STEPS, {}
    if is_timing:
        times = time_steps(groups, data_root)
        device = groups[0].runs[0]["device"]
        content = {"device": device, "versions": results.versions(), "ms": times}
        results.write_json(path, content)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["ms"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{path}' cannot be read ({error}): measure again") from None
    parts = ["# Accuracy and what it costs"]
    several = tasks(groups)
    for members in several:
        parts += [f"## {members[0].task_title}", markdown(accuracy_table(members, known))]
        if radii := chosen(members):
            parts += ["Radii:", markdown(radii)]
        for plain in members:
            if plain.config.opt_name not in ("sgd", "sam") or not plain.is_of_the_report:
                continue
            rows = (
                [] if plain.config.opt_name == "sam" and radii else difference_table(members, plain)
            )
            label = short_labels(members)[members.index(plain)]
            if rows:
                parts += [f"Points more than {label}:", markdown(rows)]
    parts.append(NOTES)
    results.save_figure(folder / "worth.png", plot(several, known))
    parts.append("![worth](worth.png)")
    results.write_text(folder / "worth.md", "\n\n".join(parts) + "\n")
    return folder / "worth.md"


def main(arguments: Sequence[str]) -> int:
    """Write the page, and return the exit code of the process."""
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    allowed = {"output_dir": "DIR", "time": "true", "data_root": "DIR"}
    folders, flags = folders_and_flags(arguments, allowed)
    if (is_timing := flags.get("time", "false")) not in ("true", "false"):
        raise ConfigError(f"time={is_timing}: allowed true, false")
    folder = Path(flags.get("output_dir", folders[0]))
    path = write_worth(folders, folder, is_timing == "true", flags.get("data_root", ""))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
