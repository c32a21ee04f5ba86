"""`python -m train.report DIR...`: the report's tables beside the published figures, and plots."""

import csv
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from train import results
from train.__main__ import guarded
from train.config import FIELDS, Config, parse_flags
from train.errors import CheckpointError, ConfigError

PUBLISHED = Path(__file__).parent / "published.yaml"

USAGE = """\
python -m train.report DIR [DIR ...] [--output_dir=DIR]

Collects every complete run (result.json, sharpness.json) below the folders. Writes report.md,
tables.csv, runs.csv and plots into --output_dir (default: the first DIR).
"""

TITLES = {
    "sgd": "SGD",
    "sgdhess": "SGDHess",
    "sam": "SAM",
    "samdirection": "SAMDirection",
    "sammagnitude": "SAMMagnitude",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "wrn28_10": "WRN-28-10",
    "resnet_small": "small ResNet",
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "fashion": "Fashion-MNIST",
    "digits": "digits",
}
COLOURS = {
    "sgd": "black",
    "sgdhess": "tab:purple",
    "sam": "tab:blue",
    "samdirection": "tab:orange",
    "sammagnitude": "tab:green",
}
STYLES = ("-", "--", ":", "-.")
# What the published figures were made with; a run with other values is compared all the same, and
# said to depart.
PROTOCOL = (
    "epochs", "batch_size", "lr", "momentum", "wd", "nesterov", "scheduler", "precision",
    "label_noise",
)  # fmt: skip
REPORT_SHARPNESS = "40 batches of 256 images"
NOTES = """\
- accuracy: of the test set, in percent, for the checkpoint with the best validation accuracy.
- sharpness: for each of the augmented training batches alone, the five eigenvalues of the Hessian
  that are largest in magnitude; the mean of the positive ones. It is not lambda_max.
- lambda_max: largest eigenvalue of the Hessian over a fixed set of unaugmented training images;
  trace: over the same set, by random vectors.
- mean ± deviation over the seeds, where there are several. In parentheses: the published figure;
  ?? are cells that the report left open, and - runs that are not there."""


@dataclass
class Group:
    """Runs that differ in their seed only.

    label: the optimizer and what distinguishes it.
    """

    config: Config
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """As in the run's name."""
        return self.config.run_name

    @property
    def task(self) -> tuple[str, str]:
        """What accuracies may be compared within."""
        noise = f", {self.config.label_noise:.0%} wrong labels" if self.config.label_noise else ""
        return TITLES[self.config.dataset] + noise, self.config.model

    def values(self, name: str) -> list[float]:
        """A figure of each run that has it; accuracies in percent."""
        factor = 100 if name.endswith("accuracy") else 1
        found = [run["figures"].get(name) for run in self.runs]
        return [factor * value for value in found if value is not None]

    def history(self, name: str) -> tuple[list[int], list[float]]:
        """(epochs, means over the runs) of an entry of the history."""
        rows: dict[int, list[float]] = {}
        for run in self.runs:
            for entry in run["history"]:
                if entry.get(name) is not None:
                    rows.setdefault(entry["epoch"], []).append(entry[name])
        epochs = sorted(rows)
        return epochs, [statistics.fmean(rows[epoch]) for epoch in epochs]


def load_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The results below the folders, each with the sharpness.json beside it.

    Raises:
        ConfigError: a folder is missing, or there is no run in any.
        CheckpointError: a file cannot be read.
    """
    runs = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"there is no folder '{folder}': give folders that hold runs")
        for path in sorted(folder.rglob("result.json")):
            run = results.read_result(path)
            run["density"], run["settings"] = None, dict(run["config"])
            beside = path.with_name("sharpness.json")
            if beside.exists():
                try:
                    measured = json.loads(beside.read_text(encoding="utf-8"))
                    for name in ("sharpness", "lambda_max", "trace", "trace_error"):
                        # Measured later, by train.sharpness: it counts.
                        if measured[name] is not None:
                            run["figures"][name] = measured[name]
                    run["density"] = measured["density"]
                    run["settings"].update(measured["settings"])
                except (ValueError, KeyError, TypeError) as error:
                    raise CheckpointError(
                        f"'{beside}' cannot be read ({error}): run train.sharpness on best.pt again"
                    ) from None
            runs.append(run)
    if not runs:
        raise ConfigError(
            f"no complete run (result.json) in {', '.join(map(str, folders))}: run a study first"
        )
    return runs


def grouped(runs: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups in the order of data set, model, optimizer and rho.

    The same run in two folders counts once.
    """
    groups: dict[Config, Group] = {}
    for run in runs:
        known = {k: v for k, v in run["config"].items() if k in FIELDS}
        for name, key in FIELDS.items():
            # What does not matter for the figures must not part runs.
            if name == "seed" or not key.metadata["matters"]:
                known[name] = key.default
        unused = {
            "sgd": ("rho", "adaptive", "granularity", "backend"),
            "sgdhess": ("adaptive", "granularity"),
            "sam": ("granularity",),
        }
        for name in unused.get(known["opt_name"], ()):
            known[name] = FIELDS[name].default
        group = groups.setdefault(Config(**known), Group(Config(**known)))
        if run["config"]["seed"] not in [other["config"]["seed"] for other in group.runs]:
            group.runs.append(run)
    order = {name: i for i, name in enumerate(TITLES)}
    return sorted(
        groups.values(),
        key=lambda g: (g.task[0], order[g.config.model], order[g.config.opt_name], g.config.rho),
    )


def mean_and_deviation(values: Sequence[float], form: str = ".2f") -> str:
    """Such as 79.24 ± 0.12; without a deviation for one value, - for none."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def published(figure: str, model: str, opt_name: str, rho: float) -> tuple[bool, float | None]:
    """Whether the report has the cell, and its figure: None for ??."""
    cells = yaml.safe_load(PUBLISHED.read_text())[figure].get(model, {}).get(opt_name, {})
    if not isinstance(cells, dict):
        return True, cells
    return rho in cells, cells.get(rho)


def _comparable(group: Group) -> bool:
    """Whether a group belongs into the report's tables, whose SAM runs are of one kind."""
    config = group.config
    plain = config.granularity == "element" and not config.adaptive
    return config.dataset == "cifar100" and plain


def measured_on(run: Mapping[str, Any]) -> str | None:
    """What the sharpness of a run is made of; None if it has none."""
    if run["figures"].get("sharpness") is None:
        return None
    settings = run["settings"]
    return f"{settings['sharpness_batches']} batches of {settings['sharpness_batch_size']} images"


def departures(groups: Iterable[Group]) -> list[str]:
    """Where comparable groups do not follow the protocol of the published figures."""
    protocol = Config()
    found = []
    for group in groups:
        different = [
            f"{name}={getattr(group.config, name)} ({getattr(protocol, name)})"
            for name in PROTOCOL
            if getattr(group.config, name) != getattr(protocol, name)
        ]
        ways = {way for run in group.runs if (way := measured_on(run))}
        different += [f"sharpness of {way} (40 of 256)" for way in ways - {REPORT_SHARPNESS}]
        if _comparable(group) and different:
            name = f"{TITLES[group.config.model]} {group.label}"
            found.append(f"{name}: {', '.join(different)}")
    return found


def _with_published(values: Sequence[float], figure: str, group: tuple[str, str, float]) -> str:
    there, value = published(figure, *group)
    ours = mean_and_deviation(values)
    if not there:
        return ours
    return f"{ours} ({'??' if value is None else format(value, '.2f')})"


def report_table(groups: Sequence[Group], figure: str) -> list[list[str]]:
    """A table of the report, head first: a row for model and optimizer, a column for each rho."""
    name = {"accuracy": "test_accuracy", "sharpness": "sharpness"}[figure]
    ours = {
        (g.config.model, g.config.opt_name, g.config.rho): g.values(name)
        for g in groups
        if _comparable(g)
    }
    tables = yaml.safe_load(PUBLISHED.read_text())[figure]
    models = [m for m in TITLES if m in tables or any(key[0] == m for key in ours)]
    rhos = (0.1, 0.2, 0.4)
    rows = [["model", "optimizer", *(f"rho {rho:g}" for rho in rhos)]]
    for model in models:
        for opt in ("sam", "samdirection", "sammagnitude"):
            cells = [
                _with_published(ours.get((model, opt, rho), []), figure, (model, opt, rho))
                for rho in rhos
            ]
            rows.append([TITLES[model], TITLES[opt], *cells])
    return rows


def single_pass_table(groups: Sequence[Group]) -> list[list[str]]:
    """The report's third table: SGD and SGDHess with ResNet-18."""
    rows = [["ResNet-18", "accuracy", "sharpness"]]
    for opt, rho in (("sgd", None), ("sgdhess", 0.05), ("sgdhess", 1.0), ("sgdhess", 2.0)):
        cells = []
        for figure, name in (("accuracy", "test_accuracy"), ("sharpness", "sharpness")):
            values = [
                value
                for g in groups
                if _comparable(g) and (g.config.model, g.config.opt_name) == ("resnet18", opt)
                and rho in (None, g.config.rho)
                for value in g.values(name)
            ]  # fmt: skip
            cells.append(_with_published(values, figure, ("resnet18", opt, rho or 0.0)))
        rows.append([TITLES[opt] + (f" rho {rho:g}" if rho else ""), *cells])
    return rows


def summary_table(groups: Sequence[Group]) -> list[list[str]]:
    """One row per group, head first."""
    columns: list[tuple[str, str, str]] = [
        ("accuracy, %", "test_accuracy", ".2f"),
        ("sharpness", "sharpness", ".2f"),
        ("lambda_max", "lambda_max", ".2f"),
        ("trace", "trace", ".1f"),
        ("best epoch", "best_epoch", ".0f"),
        ("ms per optimizer step", "ms_per_optimizer_step", ".2f"),
        ("seconds per epoch", "seconds_per_epoch", ".1f"),
    ]
    rows = [["data set", "model", "optimizer", "seeds", *(column[0] for column in columns)]]
    for group in groups:
        cells = [mean_and_deviation(group.values(name), form) for _, name, form in columns]
        dataset, model = group.task
        rows.append([dataset, TITLES[model], group.label, str(len(group.runs)), *cells])
    return rows


# -- plots -----------------------------------------------------------------------------------------


def _style(groups: Sequence[Group], group: Group) -> dict[str, Any]:
    """Colour by optimizer; line by rho and variant within it."""
    alike = [g for g in groups if g.config.opt_name == group.config.opt_name]
    index = alike.index(group)
    return {
        "color": COLOURS[group.config.opt_name],
        "linestyle": STYLES[index % len(STYLES)],
        "label": group.label,
    }


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Up to two panels in a row."""
    rows, columns = (panels + 1) // 2, min(panels, 2)
    figure = Figure(figsize=(5.2 * columns + 0.8, 4.0 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for part in axes:
        part.grid(alpha=0.3)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the panels: within one it would hide lines."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")


def _title(figure: Figure, title: str) -> None:
    """At the left: the legend is at the right."""
    figure.suptitle(title, x=0.02, ha="left", fontsize="medium")


def _plain_numbers(axis: Axis) -> None:
    """20 and 30 on a logarithmic axis, not 2 x 10^1 and 3 x 10^1."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _plot_histories(
    groups: Sequence[Group], panels: Sequence[tuple[str, str, float]], title: str
) -> Figure | None:
    """Lines over the epochs for (entry, axis label, factor). None if no run has the first entry."""
    if not any(group.history(panels[0][0])[0] for group in groups):
        return None
    figure, axes = _figure(len(panels))
    for part, (name, label, factor) in zip(axes, panels, strict=True):
        for group in groups:
            epochs, values = group.history(name)
            if not epochs:
                continue
            # A single epoch is a single point, which a line would not show.
            marker = "o" if len(epochs) == 1 else ""
            part.plot(epochs, [factor * v for v in values], marker=marker, **_style(groups, group))
        part.set(xlabel="epoch", ylabel=label)
        part.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes[-1])
    _title(figure, title)
    return figure


def plot_curves(groups: Sequence[Group], title: str) -> Figure | None:
    """Training curves."""
    panels = [
        ("train_loss", "training loss (cross-entropy)", 1.0),
        ("val_accuracy", "validation accuracy, %", 100.0),
    ]
    return _plot_histories(groups, panels, title)


def plot_magnitudes(groups: Sequence[Group], title: str) -> Figure | None:
    """The magnitude comparison: how g2 compares with g1, element by element."""
    panels = [
        ("share_second_larger", "share of |g2| > |g1|, %", 100.0),
        ("share_signs_agree", "share of agreeing signs, %", 100.0),
    ]
    return _plot_histories(groups, panels, title)


def plot_norms(groups: Sequence[Group], title: str) -> Figure | None:
    """Norms of the gradients and the weights, and the cosine of the gradients."""
    panels = [
        ("first_grad_norm", "norm of g1", 1.0),
        ("second_grad_norm", "norm of g2", 1.0),
        ("cosine", "cosine of g1 and g2", 1.0),
        ("weight_norm", "norm of w", 1.0),
    ]
    return _plot_histories(groups, panels, title)


def plot_against_rho(
    groups: Sequence[Group], name: str, label: str, title: str, log: bool
) -> Figure | None:
    """A figure over rho, a line for each optimizer; SGD as a level. Published: dashed, hollow.

    None where there are not two rho to compare.
    """
    if len({g.config.rho for g in groups if g.config.opt_name != "sgd" and g.values(name)}) < 2:
        return None
    figure, (axes,) = _figure(1)
    lines: dict[str, list[Group]] = {}
    for group in groups:
        variant = group.label.replace(f"-rho{group.config.rho:g}", "")
        if group.values(name):
            lines.setdefault(variant, []).append(group)
    marks = set()
    for variant, members in lines.items():
        config = members[0].config
        colour = COLOURS[config.opt_name]
        means = [statistics.fmean(group.values(name)) for group in members]
        if config.opt_name == "sgd":
            axes.axhline(means[0], color=colour, label=variant, linewidth=1)
            continue
        spread = [
            statistics.stdev(v) if len(v := group.values(name)) > 1 else 0.0 for group in members
        ]
        rhos = [group.config.rho for group in members]
        marks.update(rhos)
        style = "-" if config.granularity == "element" and not config.adaptive else ":"
        axes.errorbar(
            rhos, means, spread, color=colour, label=variant, marker="o", capsize=3, linestyle=style
        )
    figure_name = {"test_accuracy": "accuracy", "sharpness": "sharpness"}[name]
    if groups[0].config.dataset == "cifar100":
        model = groups[0].config.model
        for opt in ("sam", "samdirection", "sammagnitude"):
            cells = {rho: published(figure_name, model, opt, rho)[1] for rho in (0.1, 0.2, 0.4)}
            known = {rho: value for rho, value in cells.items() if value is not None}
            if known:
                axes.plot(
                    list(known), list(known.values()), color=COLOURS[opt], marker="o",
                    markerfacecolor="none", linestyle="--", linewidth=0.8,
                    label=f"{opt}, published",
                )  # fmt: skip
                marks.update(known)
    axes.set(xlabel="rho", ylabel=label)
    if log:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    if marks:
        axes.set_xscale("log")
        axes.set_xticks(sorted(marks), [f"{rho:g}" for rho in sorted(marks)])
        axes.set_xticks([], minor=True)
    _legend(figure, axes)
    _title(figure, title)
    return figure


def plot_accuracy_against_sharpness(groups: Sequence[Group], title: str) -> Figure | None:
    """A point for each group, with its rho beside it."""
    known = [g for g in groups if g.values("sharpness")]
    if not known:
        return None
    figure, (axes,) = _figure(1)
    seen = set()
    for group in known:
        x = statistics.fmean(group.values("sharpness"))
        y = statistics.fmean(group.values("test_accuracy"))
        opt = group.config.opt_name
        axes.plot(x, y, "o", color=COLOURS[opt], label=None if opt in seen else TITLES[opt])
        seen.add(opt)
        if opt != "sgd":
            axes.annotate(
                f"{group.config.rho:g}", (x, y), textcoords="offset points", xytext=(5, 4),
                fontsize="small",
            )  # fmt: skip
    axes.set(
        xlabel="sharpness (logarithmic; numbers: rho)", ylabel="test accuracy, %", xscale="log"
    )
    _plain_numbers(axes.xaxis)
    axes.margins(0.12)
    _legend(figure, axes)
    _title(figure, title)
    return figure


def plot_density(groups: Sequence[Group], title: str) -> Figure | None:
    """The eigenvalue density of the first run of each group that has it."""
    curves = [
        (group, run["density"])
        for group in groups
        for run in [r for r in group.runs if r["density"]][:1]
    ]
    if not curves:
        return None
    figure, (axes,) = _figure(1)
    for group, density in curves:
        style = {**_style(groups, group), "linewidth": 1}
        axes.semilogy(density["values"], density["density"], **style)
    top = max(max(density["density"]) for _, density in curves)
    # Below this, what is drawn is the width of the smoothing.
    axes.set(
        xlabel="eigenvalue of the Hessian", ylabel="spectral density", ylim=(1e-9 * top, 2 * top)
    )
    _legend(figure, axes)
    _title(figure, title)
    return figure


PLOTS: dict[str, Callable[[Sequence[Group], str], Figure | None]] = {
    "curves": plot_curves,
    "accuracy-rho": lambda groups, title: plot_against_rho(
        groups, "test_accuracy", "test accuracy, %", title, log=False
    ),
    "sharpness-rho": lambda groups, title: plot_against_rho(
        groups, "sharpness", "sharpness", title, log=True
    ),
    "accuracy-sharpness": plot_accuracy_against_sharpness,
    "magnitudes": plot_magnitudes,
    "norms": plot_norms,
    "density": plot_density,
}


def write_plots(folder: Path, groups: Sequence[Group]) -> list[str]:
    """PLOTS for each task; their file names."""
    tasks: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    names = []
    for (dataset, model), members in tasks.items():
        noise = members[0].config.label_noise
        place = f"{members[0].config.dataset}{f'-noise{noise:g}' if noise else ''}-{model}"
        for kind, plot in PLOTS.items():
            figure = plot(members, f"{dataset}, {TITLES[model]}")
            if figure is not None:
                name = f"{kind}-{place}.png"
                results.save_figure(folder / name, figure)
                names.append(name)
    return names


# -- the report ------------------------------------------------------------------------------------


def _write_text(path: Path, text: str) -> None:
    results.write_atomically(path, lambda file: file.write(text.encode()))


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _run_rows(groups: Sequence[Group]) -> list[list[Any]]:
    runs = [run for group in groups for run in group.runs]
    figures = list(dict.fromkeys(name for run in runs for name in run["figures"]))
    rows: list[list[Any]] = [["name", *FIELDS, *figures]]
    for run in runs:
        config: Mapping[str, Any] = run["config"]
        settings = [config.get(name) for name in FIELDS]
        rows.append([run["name"], *settings, *(run["figures"].get(name) for name in figures)])
    return rows


def write_report(
    sources: Sequence[Path], folder: Path, title: str = "Report", text: str = ""
) -> Path:
    """report.md, tables.csv, runs.csv and the plots, about all runs below the sources.

    Args:
        text: what the runs were for; stands under the title.

    Returns:
        the path of report.md.
    """
    groups = grouped(load_runs(sources))
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[list[str]]] = {}
    if any(_comparable(group) for group in groups):
        tables["CIFAR-100 accuracy, %: ours (published)"] = report_table(groups, "accuracy")
        tables["CIFAR-100 sharpness: ours (published)"] = report_table(groups, "sharpness")
        tables["SGD and SGDHess: ours (published)"] = single_pass_table(groups)
    tables["All runs"] = summary_table(groups)
    parts = [f"# {title}", text.strip()]
    if different := departures(groups):
        lines = "\n".join(f"- {line}" for line in different)
        parts.append(
            "**Not the protocol of the published figures** (which is in parentheses):\n\n" + lines
        )
    for name, rows in tables.items():
        parts += [f"## {name}", results.markdown(rows)]
    parts.append(NOTES)
    plots = write_plots(folder, groups)
    if plots:
        parts += ["## Plots", "\n\n".join(f"![{name[:-4]}]({name})" for name in plots)]
    checks = [run["verification"] for group in groups for run in group.runs if run["verification"]]
    conditions = [
        f"- runs: {sum(len(group.runs) for group in groups)}",
        *_conditions(groups),
    ]
    if checks:
        worst = max(check["value"] for check in checks)
        conditions.append(
            f"- lockstep with the reference backend: {len(checks)} runs, largest relative "
            f"deviation {worst:.1e} (allowed {checks[0]['tolerance']:.0e})"
        )
    parts += ["## Conditions", "\n".join(conditions)]
    _write_text(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    _write_text(folder / "runs.csv", _csv(_run_rows(groups)))
    blocks = [_csv([[name], *rows]) for name, rows in tables.items()]
    _write_text(folder / "tables.csv", "\n".join(blocks))
    return folder / "report.md"


def _conditions(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]

    def distinct(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    lines = [f"- device: {distinct(run['device'] for run in runs)}"]
    for name in runs[0]["versions"]:
        lines.append(f"- {name}: {distinct(str(run['versions'].get(name)) for run in runs)}")
    backends = (f"{name} ({key})" for run in runs for key, name in run["backends"].items())
    lines.append(f"- optimizer steps by: {distinct(backends)}")
    ways = distinct(way for run in runs if (way := measured_on(run)))
    if ways:
        lines.append(f"- sharpness of: {ways}")
    configs = [group.config for group in groups]
    common = [
        f"{name}={getattr(configs[0], name)}"
        for name, key in FIELDS.items()
        if key.metadata["matters"]
        and name != "seed"
        and len({getattr(config, name) for config in configs}) == 1
    ]
    return [*lines, f"- configuration, where common to all: {', '.join(common)}"]


def main(arguments: Sequence[str]) -> int:
    """Write the report; the exit code of the process."""
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    folders = [Path(word) for word in arguments if not word.startswith("--")]
    flags = parse_flags([word for word in arguments if word.startswith("--")])
    if set(flags) - {"output_dir"}:
        raise ConfigError(f"unknown flag --{next(iter(flags))}: allowed --output_dir=DIR")
    path = write_report(folders, Path(flags.get("output_dir", folders[0])))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
