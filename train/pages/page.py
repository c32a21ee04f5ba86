"""Write the report: tables of runs beside the published figures, plots, and the page with them."""

import csv
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from train.pages import claims
from train.pages.groups import (
    ALL_RUNS,
    ROUNDING,
    Group,
    grouped,
    load_runs,
    mean_and_deviation,
    tasks,
    title_of,
)
from train.pages.plots import all_plots
from train.pages.tables import markdown
from train.settings.config import FIELDS, Config, known_keys
from train.shared import results

PUBLISHED = Path(__file__).parent / "published.yaml"
# These optimizers are in the tables of the published figures.
TWO_PASS_ROWS = ("sam", "samdirection", "sammagnitude")
ONE_PASS_ROWS = ("sgd", "sgdhess")
REPORT_SHARPNESS = "40 batches of 256 images"
NOTES = """\
- accuracy: of the test set, in percent, for the checkpoint with the best validation accuracy (the
  first of equals); "at chance": within two standard deviations of guessing.
- sharpness: for each of the augmented training batches alone, the five eigenvalues of the Hessian
  that are largest in magnitude; the mean of the positive ones. It is not lambda_max. Beside it the
  largest of them all, and the share of negative ones.
- lambda_max: largest eigenvalue of the Hessian over a fixed set of unaugmented training images with
  the labels trained on, eval mode, no weight decay; trace: over the same set, by random vectors.
- deviation: the largest relative deviation of any parameter from the reference backend, over the
  first steps, which were taken in lockstep with it.
- ms: medians; lockstep steps and the warm-up are left out. The optimizer step is first_step and
  second_step together; the training step has the batch, the passes and the optimizer.
- mean ± standard deviation over the seeds, where there are several; - where nothing is."""


@functools.cache
def _published() -> Any:
    return yaml.safe_load(PUBLISHED.read_text())


def published_figures(figure: str, model: str, opt_name: str) -> Mapping[float, float | None]:
    """Return the report's cells by rho, which is 0 for SGD; None stands for the report's ??."""
    name = {"test_accuracy": "accuracy"}.get(figure, figure)
    cells = _published()[name].get(model, {}).get(opt_name, {})
    return cells if isinstance(cells, dict) else {0.0: cells}


def _known_figures(figure: str, model: str, opt_name: str) -> Mapping[float, float]:
    cells = published_figures(figure, model, opt_name)
    return {rho: value for rho, value in cells.items() if value is not None}


def _comparable(group: Group) -> bool:
    """Return whether a group belongs in the report's tables, which are of CIFAR-100 and have each
    optimizer with the report's options only."""
    return group.config.dataset == "cifar100" and group.is_of_the_report


def measured_on(run: Mapping[str, Any]) -> str | None:
    """Say over which batches the sharpness of a run was measured; None if it was not measured."""
    if run["figures"].get("sharpness") is None:
        return None
    settings = run["settings"]
    return f"{settings['sharpness_batches']} batches of {settings['sharpness_batch_size']} images"


def departures(groups: Iterable[Group]) -> list[str]:
    """Say where comparable groups do not follow the protocol of the published figures."""
    found: dict[str, list[str]] = {}
    comparable = [group for group in groups if _comparable(group)]
    for group in comparable:
        protocol = Config(opt_name=group.config.opt_name)
        different = [
            f"{name}={value} ({getattr(protocol, name)})"
            for name, value in group.recipe.items()
            if name not in ("opt_name", "rho", "model", *ROUNDING)
            and value != getattr(protocol, name)
        ]
        ways = {way for run in group.runs if (way := measured_on(run))}
        different += [f"sharpness of {way} (40 of 256)" for way in ways - {REPORT_SHARPNESS}]
        for difference in different:
            found.setdefault(difference, []).append(f"{title_of(group.config.model)} {group.label}")
    return [
        f"{difference}: {'all runs' if len(names) == len(comparable) else '; '.join(names)}"
        for difference, names in found.items()
    ]


# -- tables ----------------------------------------------------------------------------------------


def _cell(group: Group, name: str, form: str = ".2f", factor: float = 1.0) -> str:
    """Return mean and deviation, and say how many runs have the figure where not all have it."""
    values = [factor * value for value in group.values(name)]
    text = mean_and_deviation(values, form)
    return f"{text} ({len(values)} of them)" if 0 < len(values) < len(group.runs) else text


def _counted(group: Group, name: str) -> str:
    """Return a cell of the report's tables, which says how many seeds there are."""
    values = group.values(name)
    text = mean_and_deviation(values) + (f", n={len(values)}" if values else "")
    return f"{text}; {group.remarks}" if group.remarks else text


def report_table(groups: Sequence[Group], figure: str, model: str) -> list[list[str]]:
    """Return a table of the report, head first: each optimizer has our row and the published one.

    Groups that differ in a key other than rho have rows of their own.
    """
    columns = (0.1, 0.2, 0.4)
    rows = [[title_of(model), *(f"rho {rho:g}" for rho in columns)]]
    for opt_name in TWO_PASS_ROWS:
        lines: dict[str, dict[float, str]] = {}
        for group in groups:
            config = group.config
            if _comparable(group) and (config.model, config.opt_name) == (model, opt_name):
                rest = group.variant.removeprefix(f"rho {config.rho:g}")
                lines.setdefault(rest, {})[config.rho] = _counted(group, figure)
        for rest, cells in (lines or {"": {}}).items():
            rows.append([title_of(opt_name) + rest, *(cells.get(rho, "-") for rho in columns)])
        theirs = published_figures(figure, model, opt_name)
        if theirs:
            rows.append(["published", *(_published_cell(theirs, rho) for rho in columns)])
    return rows


def _published_cell(theirs: Mapping[float, float | None], rho: float) -> str:
    if rho not in theirs:
        return "-"
    value = theirs[rho]
    return "??" if value is None else f"{value:.2f}"


def single_pass_table(groups: Sequence[Group], model: str) -> list[list[str]]:
    """Return the report's third table, with SGD and SGDHess; the report has it for ResNet-18."""
    rows = [[title_of(model), "accuracy", "published", "sharpness", "published"]]
    ours = {
        group.label: group
        for group in groups
        if _comparable(group)
        and group.config.model == model
        and group.config.opt_name in ONE_PASS_ROWS
    }
    done = {
        (g.config.opt_name, g.config.rho if g.config.uses("rho") else 0.0) for g in ours.values()
    }
    lines = [
        (label, g, g.config.opt_name, g.config.rho if g.config.uses("rho") else 0.0)
        for label, g in ours.items()
    ]
    for opt_name in ONE_PASS_ROWS:
        for rho in published_figures("test_accuracy", model, opt_name):
            if (opt_name, rho) not in done:
                label = title_of(opt_name) + (f", rho {rho:g}" if rho else "")
                lines.append((label, Group(Config(opt_name=opt_name)), opt_name, rho))
    for label, group, opt_name, rho in sorted(lines, key=lambda line: (line[2], line[3])):
        row = [label]
        for figure in ("test_accuracy", "sharpness"):
            theirs = published_figures(figure, model, opt_name)
            row += [_counted(group, figure), _published_cell(theirs, rho)]
        rows.append(row)
    return rows


def accuracy_table(groups: Sequence[Group]) -> list[list[str]]:
    """Return one row per group of a task, with its accuracy; head first."""
    rows = [["optimizer", "seeds", "accuracy, %", "validation, %", "best epoch", "remarks"]]
    for group in groups:
        cells = [
            _cell(group, "test_accuracy"),
            _cell(group, "best_val_accuracy"),
            _cell(group, "best_epoch", ".0f"),
        ]
        rows.append([group.label, str(len(group.runs)), *cells, group.remarks])
    return _without_empty_columns(rows)


def sharpness_table(groups: Sequence[Group]) -> list[list[str]]:
    """Return one row per group, with its sharpness, head first; [] if nothing was measured."""
    rows = [["optimizer", "sharpness", "largest", "negative, %", "lambda_max", "trace"]]
    for group in groups:
        cells = [
            _cell(group, "sharpness"),
            _cell(group, "largest_eigenvalue", ".1f"),
            _cell(group, "negative_share", ".0f", 100),
            _cell(group, "lambda_max"),
            _cell(group, "trace", ".1f"),
        ]
        rows.append([group.label, *cells])
    rows = _without_empty_columns(rows)
    return rows if len(rows[0]) > 1 else []


def cost_table(groups: Sequence[Group]) -> list[list[str]]:
    """Return one row per group of a task, with its times; head first."""
    rows = [["optimizer", "ms, optimizer step", "ms, training step", "s per epoch"]]
    for group in groups:
        cells = [
            _cell(group, "ms_per_optimizer_step"),
            _cell(group, "ms_per_training_step"),
            _cell(group, "seconds_per_epoch", ".1f"),
        ]
        rows.append([group.label, *cells])
    return rows


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    kept = [i for i in range(len(rows[0])) if any(row[i] not in ("", "-") for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def print_summary(console: Console, runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of runs, in 80 columns, with one row for all seeds of a configuration."""
    columns: list[tuple[str, str, str]] = [
        ("accuracy, %", "test_accuracy", ".2f"),
        ("sharpness", "sharpness", ".1f"),
        ("lambda_max", "lambda_max", ".1f"),
        ("ms/step", "ms_per_training_step", ".1f"),
    ]
    groups, _ = grouped(dict(run) for run in runs)
    for members in tasks(groups):
        rows = [["optimizer", *(title for title, _, _ in columns), "deviation", "seeds"]]
        for group in members:
            checks = [run["verification"]["value"] for run in group.runs if run["verification"]]
            cells = [_cell(group, name, form) for _, name, form in columns]
            deviation = f"{max(checks):.0e}" if checks else "-"
            rows.append([group.label, *cells, deviation, str(len(group.runs))])
        rows = _without_empty_columns(rows)
        table = Table(title=members[0].task_title, title_justify="left", padding=(0, 1, 0, 0))
        for number, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    notes = []
    if any(run["verification"] for group in groups for run in group.runs):
        notes.append("deviation: of the weights from the reference backend's, in the first steps.")
    if any(len(group.runs) == 1 for group in groups):
        notes.append("One seed decides nothing: a point or two of accuracy may be chance.")
    for note in notes:
        console.print(note)


# -- the report ------------------------------------------------------------------------------------


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _without_paths(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run without output_dir, and with the last part of data_root, by which class folders
    are known, and of label_noise_file."""
    kept = dict(run)
    for name in ("config", "settings"):
        if name in run:
            kept[name] = {k: v for k, v in run[name].items() if k != "output_dir"}
            for place in ("data_root", "label_noise_file"):
                if place in kept[name]:
                    kept[name][place] = Path(kept[name][place]).name
    return kept


def _run_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    figures = list(dict.fromkeys(name for run in runs for name in run["figures"]))
    rows: list[list[Any]] = [["name", *FIELDS, *figures]]
    for run in runs:
        settings = [run["config"].get(name) for name in FIELDS]
        rows.append([run["name"], *settings, *(run["figures"].get(name) for name in figures)])
    return rows


def write_report(
    sources: Sequence[Path], folder: Path, title: str = "Report", text: str = ""
) -> Path:
    """Write report.md, tables.csv, runs.csv, runs.jsonl and plots, of all runs below the sources.

    In the folder of a run itself, only report.md and the plots are written.

    Args:
        text: what the runs were for; it stands under the title.

    Returns:
        the path of report.md.
    """
    groups, left_out = grouped(load_runs(sources))
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run for group in groups for run in group.runs]
    lost = [run for group in groups for run in group.diverged]
    tables: dict[str, list[list[str]]] = {}
    parts = [f"# {title}", text.strip()]

    def add(heading: str, rows: list[list[str]], level: str = "##") -> None:
        if len(rows) > 1:
            tables[heading] = rows
            parts.extend([f"{level} {heading}", markdown(rows)])

    if different := departures(groups):
        parts.append(
            "**Not the protocol of the published figures** (which is in parentheses):\n\n"
            + "\n".join(f"- {line}" for line in different)
        )
    if left_out:
        parts.append("**Left out**:\n\n" + "\n".join(f"- {line}" for line in left_out))
    for model in dict.fromkeys(g.config.model for g in groups if _comparable(g)):
        ours = [g for g in groups if _comparable(g) and g.config.model == model]
        if any(g.config.opt_name in TWO_PASS_ROWS for g in ours):
            for figure, words in (("test_accuracy", "accuracy, %"), ("sharpness", "sharpness")):
                heading = f"CIFAR-100 {words}: {title_of(model)}, ours and published"
                add(heading, report_table(groups, figure, model))
        if any(g.config.opt_name in ONE_PASS_ROWS for g in ours):
            heading = f"CIFAR-100, one pass: {title_of(model)}, ours and published"
            add(heading, single_pass_table(groups, model))
    is_tested = False
    for members in tasks(groups):
        name = members[0].task_title
        add(f"Accuracy: {name}", accuracy_table(members))
        add(f"Sharpness: {name}", sharpness_table(members))
        add(f"Time: {name}", cost_table(members))
        add(f"Against the base optimizer: {name}", claims.against_sgd_table(members))
        tested = claims.claims_table(members)
        add(f"The report's claims: {name}", tested)
        is_tested = is_tested or bool(tested)
    parts.append(NOTES)
    if is_tested:
        stated = (f"- claim {number}: {claim}." for number, claim in claims.CLAIMS.items())
        parts.append("\n".join([*stated, claims.NOTES]))
    if lost:
        said = (
            f"- {Config(**known_keys(run['config'])).full_name}: {run['error']}" for run in lost
        )
        parts += ["## Diverged", "\n".join(said)]
    if plots := _write_plots(folder, groups):
        parts += ["## Plots", "\n\n".join(f"![{name[:-4]}]({name})" for name in plots)]
    if runs:
        parts += ["## Conditions", "\n".join(_conditions(groups, runs))]
    results.write_text(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    if not (folder / "result.json").exists():  # result.json has all of one run
        results.write_text(folder / "runs.csv", _csv(_run_rows(list(map(_without_paths, runs)))))
        results.write_json_lines(folder / ALL_RUNS, map(_without_paths, [*runs, *lost]))
        blocks = [_csv([[name], *rows]) for name, rows in tables.items()]
        results.write_text(folder / "tables.csv", "\n".join(blocks))
    return folder / "report.md"


def _write_plots(folder: Path, groups: Sequence[Group]) -> list[str]:
    """Write the plots of each task, and return their file names."""
    names = []
    parts = tasks([group for group in groups if group.runs])
    for members in parts:
        place = f"-{members[0].task_name}" if len(parts) > 1 else ""
        for kind, figure in all_plots(members, members[0].task_title, _known_figures).items():
            if figure is not None:
                names.append(f"{kind}{place}.png")
                results.save_figure(folder / names[-1], figure)
    return names


def _conditions(groups: Sequence[Group], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    def distinct(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    lines = [f"- runs: {len(runs)}", f"- device: {distinct(run['device'] for run in runs)}"]
    for name in runs[0]["versions"]:
        lines.append(f"- {name}: {distinct(str(run['versions'].get(name)) for run in runs)}")
    backends = (f"{name} ({key})" for run in runs for key, name in run["backends"].items())
    lines.append(f"- optimizer steps by: {distinct(backends)}")
    if parameters := {run["parameters"] for run in runs if "parameters" in run}:
        lines.append(f"- parameters: {'; '.join(f'{n:,}' for n in sorted(parameters))}")
    if ways := distinct(way for run in runs if (way := measured_on(run))):
        lines.append(f"- sharpness of: {ways}")
    common = [
        f"{name}={value}"
        for name, value in groups[0].recipe.items()
        if all(group.recipe.get(name, value) == value for group in groups)
    ]
    lines.append(f"- configuration, where common to all: {', '.join(common)}")
    checks = [run["verification"] for run in runs if run["verification"]]
    if checks:
        worst = max(check["value"] for check in checks)
        lines.append(
            f"- lockstep with the reference backend: {len(checks)} runs, largest relative "
            f"deviation {worst:.1e} (allowed {checks[0]['tolerance']:.0e})"
        )
    return lines
