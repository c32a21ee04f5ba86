"""Draw plots of groups of runs: one colour and marker for each optimizer, darker for larger rho."""

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from train.pages.groups import Group, title_of
from train.settings.registry import OPTIMIZERS

MARKERS = "osD^vPX*<>hpd8"
LIGHTEST = 0.6  # the colour of the smallest rho has this share of white
COLUMNS = 5  # a row has at most so many panels

Published = Callable[[str, str, str], Mapping[float, float]]


def style_of(opt_name: str) -> dict[str, Any]:
    """Return colour and marker of an optimizer; they are the same in all plots."""
    index = list(OPTIMIZERS).index(opt_name)
    return {"color": OPTIMIZERS[opt_name].colour, "marker": MARKERS[index % len(MARKERS)]}


def shade(colour: str, index: int, number: int) -> str:
    """Return the colour of line `index` of `number` lines: the first is the lightest."""
    white = LIGHTEST * (1 - index / (number - 1)) if number > 1 else 0.0
    red, green, blue = (white + (1 - white) * part for part in colors.to_rgb(colour))
    return colors.to_hex((red, green, blue))


def _by_optimizer(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.config.opt_name, []).append(group)
    return found


def _title(figure: Figure, title: str, beside: float = 0.0) -> None:
    """Write the title in lines of the figure's width, less `beside` inches for a legend."""
    letters = int(11 * (figure.get_figwidth() - beside))
    figure.suptitle(textwrap.fill(title, letters), x=0.01, ha="left", fontsize="medium")


def _plain_numbers(axis: Axis) -> None:
    """Write 20 and 30 on a logarithmic axis, not 2 x 10^1 and 3 x 10^1."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _common_part(groups: Sequence[Group]) -> str:
    """Return the title of a legend: rho where the variants have nothing else, or nothing."""
    return "rho" if all(g.variant == f"rho {g.config.rho:g}" for g in groups) else ""


def _variant(group: Group, title: str) -> str:
    return f"{group.config.rho:g}" if title == "rho" else group.variant or group.optimizer


# -- panels, one column for each optimizer ---------------------------------------------------------


def _panels(
    groups: Sequence[Group],
    metrics: Sequence[str],
    draw: Callable[[Axes, int, Group, Mapping[str, Any]], bool],
    title: str,
    xlabel: str,
) -> Figure | None:
    """Draw panels for each metric, COLUMNS optimizers in a row at most; their y axes agree.

    Where SGD has one group among other optimizers, each panel shows it, for comparison.

    Args:
        draw: a function that takes axes, index of the metric, group and line style, and says
            whether it drew anything.
    """
    by_optimizer = _by_optimizer(groups)
    reference = by_optimizer.get("sgd", [])
    if len(reference) == 1 and len(by_optimizer) > 1:
        del by_optimizer["sgd"]
    else:
        reference = []
    columns = min(len(by_optimizer), COLUMNS)
    rows_each = math.ceil(len(by_optimizer) / COLUMNS)
    rows = rows_each * len(metrics)
    figure = Figure(figsize=(max(2.5 * columns + 0.9, 4.8), 2.3 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    shown: list[Axes] = []
    for metric, label in enumerate(metrics):
        of_metric: list[Axes] = []
        for index, (opt_name, members) in enumerate(by_optimizer.items()):
            axes = grid[metric * rows_each + index // COLUMNS][index % COLUMNS]
            style = style_of(opt_name)
            heading = _common_part(members)
            drawn = 0
            for number, group in enumerate(members):
                colour = shade(style["color"], number, len(members))
                line = {"color": colour, "label": _variant(group, heading), "zorder": 3}
                drawn += draw(axes, metric, group, line)
            axes.grid(alpha=0.3)
            if metric == 0:
                axes.set_title(title_of(opt_name), fontsize="medium", color=style["color"])
            if drawn == 0:
                axes.axis("off")
                continue
            for group in reference:
                line = {"color": "0.35", "label": "SGD", "linestyle": "--", "linewidth": 1}
                draw(axes, metric, group, line)
            if metric == 0:
                axes.legend(title=heading or None, fontsize="x-small", title_fontsize="x-small")
            if of_metric:
                axes.sharey(of_metric[0])
                axes.tick_params(labelleft=index % COLUMNS == 0)
            if not of_metric or index % COLUMNS == 0:
                axes.set_ylabel(label)
            of_metric.append(axes)
            if metric == len(metrics) - 1:
                axes.set_xlabel(xlabel)
                axes.tick_params(labelbottom=True)
        shown += of_metric
    for axes in grid.flat[len(by_optimizer) :] if rows_each > 1 else ():
        if not axes.has_data() and axes not in shown:
            axes.axis("off")
    _title(figure, title)
    return figure if shown else None


def _plot_histories(
    groups: Sequence[Group], metrics: Sequence[tuple[str, str, float]], title: str
) -> Figure | None:
    """Plot means over the epochs, with bands of one standard deviation over the seeds.

    Args:
        metrics: (entry of the history, axis label, factor) for each row of panels.

    Returns:
        the figure; None where no run has the first entry.
    """
    if not any(group.history(metrics[0][0]) for group in groups):
        return None

    def draw(axes: Axes, metric: int, group: Group, line: Mapping[str, Any]) -> bool:
        name, _, factor = metrics[metric]
        rows = group.history(name)
        if not rows:
            return False  # so the legend does not name the group, either
        epochs = list(rows)
        means = [factor * statistics.fmean(values) for values in rows.values()]
        spread = [
            factor * statistics.stdev(values) if len(values) > 1 else 0.0
            for values in rows.values()
        ]
        # A single epoch is a single point, which a line would not show.
        axes.plot(epochs, means, marker="o" if len(epochs) == 1 else "", **line)
        if any(spread):
            low = [mean - part for mean, part in zip(means, spread, strict=True)]
            high = [mean + part for mean, part in zip(means, spread, strict=True)]
            axes.fill_between(epochs, low, high, color=line["color"], alpha=0.2, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        return True

    several = any(len(group.runs) > 1 for group in groups)
    said = "; mean and standard deviation over the seeds" if several else ""
    return _panels(groups, [label for _, label, _ in metrics], draw, title + said, "epoch")


def plot_curves(groups: Sequence[Group], title: str) -> Figure | None:
    """Plot the training curves."""
    return _plot_histories(
        groups,
        [
            ("train_loss", "training loss", 1.0),
            ("val_accuracy", "validation accuracy, %", 100.0),
        ],
        title,
    )


def plot_magnitudes(groups: Sequence[Group], title: str) -> Figure | None:
    """Plot the magnitude comparison: how g2 compares with g1, element by element."""
    return _plot_histories(
        groups,
        [
            ("share_second_larger", "share of |g2| > |g1|, %", 100.0),
            ("share_signs_agree", "agreeing signs, %", 100.0),
        ],
        title,
    )


def plot_norms(groups: Sequence[Group], title: str) -> Figure | None:
    """Plot norms of the gradients and the weights, and the cosine of the gradients."""
    return _plot_histories(
        groups,
        [
            ("first_grad_norm", "norm of g1", 1.0),
            ("second_grad_norm", "norm of g2", 1.0),
            ("cosine", "cosine of g1, g2", 1.0),
            ("weight_norm", "norm of w", 1.0),
        ],
        title,
    )


def plot_density(groups: Sequence[Group], title: str) -> Figure | None:
    """Plot the eigenvalue density of the first run of each group that has it."""
    tops = [max(r["density"]["density"]) for g in groups for r in g.runs if r.get("density")]
    if not tops:
        return None

    def draw(axes: Axes, metric: int, group: Group, line: Mapping[str, Any]) -> bool:
        found = [run["density"] for run in group.runs if run.get("density")][:1]
        for density in found:
            axes.semilogy(density["values"], density["density"], **{**line, "linewidth": 1})
            # Below this, the curve shows only the tails of the smoothing kernel.
            axes.set_ylim(1e-9 * max(tops), 2 * max(tops))
        return bool(found)

    return _panels(groups, ["spectral density"], draw, title, "eigenvalue of the Hessian")


def plot_eigenvalues(groups: Sequence[Group], title: str) -> Figure | None:
    """Plot the distribution, over all seeds, of the eigenvalues behind the sharpness."""

    def pooled(group: Group) -> list[float]:
        lists = [values for run in group.runs for values in run.get("eigenvalues") or []]
        return [value for values in lists for value in values]

    if not any(pooled(group) for group in groups):
        return None

    def draw(axes: Axes, metric: int, group: Group, line: Mapping[str, Any]) -> bool:
        values = sorted(pooled(group))
        shares = [(i + 1) / len(values) for i in range(len(values))]
        axes.step(values, shares, where="post", **line)
        axes.set_xscale("symlog", linthresh=1.0)
        return bool(values)

    label = "share of smaller ones"
    return _panels(groups, [label], draw, title, "eigenvalues of single batches")


# -- figures of groups -----------------------------------------------------------------------------


def _error_bar(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _without_rho(group: Group) -> str:
    return group.variant.removeprefix(f"rho {group.config.rho:g}").removeprefix(", ")


def _families(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups with a rho; SGDHess is apart: its rho is a weight, and no radius."""
    known = [g for g in groups if g.config.uses("rho")]
    parts = ([g for g in known if _is_hess(g) == is_hess] for is_hess in (False, True))
    return [part for part in parts if part]


def _is_hess(group: Group) -> bool:
    return OPTIMIZERS[group.config.opt_name].step == "hessian"


def plot_against_rho(
    groups: Sequence[Group], name: str, label: str, title: str, log: bool, published: Published
) -> Figure | None:
    """Plot a figure over rho: each optimizer and variant has a line; SGD is a level.

    Error bars and the band of SGD are one standard deviation over the seeds. Published figures are
    hollow and dashed. Return None where no optimizer has two values of rho to compare.
    """
    known = [g for g in groups if g.values(name)]
    families = _families(known)
    radii: dict[tuple[str, str], set[float]] = {}
    for group in (g for family in families for g in family):
        radii.setdefault((group.config.opt_name, _without_rho(group)), set()).add(group.config.rho)
    if max(map(len, radii.values()), default=0) < 2:
        return None
    figure = Figure(figsize=(4.0 * len(families) + 2.0, 4.2), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axes, family in zip(panels, families, strict=True):
        lines: dict[tuple[str, str], list[Group]] = {}
        for group in family:
            lines.setdefault((group.config.opt_name, _without_rho(group)), []).append(group)
        per_optimizer: dict[str, int] = {}
        marks = {group.config.rho for group in family}
        is_log = min(marks) > 0
        for number, ((opt_name, rest), members) in enumerate(lines.items()):
            style = style_of(opt_name)
            index = per_optimizer[opt_name] = per_optimizer.get(opt_name, -1) + 1
            # Points stand side by side, so that the bars do not hide each other.
            aside = number - (len(lines) - 1) / 2
            rhos = [g.config.rho * (1.04**aside if is_log else 1) for g in members]
            handles[", ".join(part for part in (title_of(opt_name), rest) if part)] = axes.errorbar(
                rhos,
                [statistics.fmean(g.values(name)) for g in members],
                [_error_bar(g.values(name)) for g in members],
                **style,
                linestyle=("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[index % 4],
                capsize=3,
                markersize=5,
            )
            figures = published(name, members[0].config.model, opt_name)
            if figures and members[0].config.dataset == "cifar100" and not rest:
                marks.update(figures)
                handles[f"{title_of(opt_name)}, published"] = axes.plot(
                    list(figures), list(figures.values()), color=style["color"],
                    marker=style["marker"], markerfacecolor="none", linestyle="--", linewidth=0.8,
                )[0]  # fmt: skip
        for group in known:
            if group.config.opt_name == "sgd":
                mean, part = statistics.fmean(v := group.values(name)), _error_bar(v)
                handles[group.label] = axes.axhline(mean, color="black", linewidth=1)
                axes.axhspan(mean - part, mean + part, color="black", alpha=0.1, linewidth=0)
        axes.set(xlabel="rho, weight of the curvature" if _is_hess(family[0]) else "rho, radius")
        axes.grid(alpha=0.3)
        if log:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        if is_log:
            axes.set_xscale("log")
        axes.set_xticks(sorted(marks), [f"{rho:g}" for rho in sorted(marks)])
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel(label)
    figure.legend(
        list(handles.values()), list(handles), loc="outside right upper", fontsize="small",
        title="optimizer", title_fontsize="small", alignment="left",
    )  # fmt: skip
    _title(figure, title, beside=2.0)
    return figure


def plot_accuracy_against_sharpness(groups: Sequence[Group], title: str) -> Figure | None:
    """Plot a point for each group, beside which is the variant of its optimizer.

    Bars are one standard deviation over the seeds.
    """
    known = [g for g in groups if g.values("sharpness")]
    if not known:
        return None
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    labels, crosses = [], []
    is_plain = all(_common_part([g]) == "rho" for g in known if g.variant)
    for opt_name, members in _by_optimizer(known).items():
        style = style_of(opt_name)
        for number, group in enumerate(members):
            sharpness, accuracy = group.values("sharpness"), group.values("test_accuracy")
            point = statistics.fmean(sharpness), statistics.fmean(accuracy)
            bars = _error_bar(sharpness), _error_bar(accuracy)
            crosses.append((point, bars))
            axes.errorbar(
                *point, xerr=bars[0], yerr=bars[1], **style,
                linestyle="", elinewidth=0.8, capsize=2, markersize=6, alpha=0.9,
                label=title_of(opt_name) if number == 0 else None,
            )  # fmt: skip
            if group.variant:
                text = group.variant.removeprefix("rho ") if is_plain else group.variant
                labels.append((text, point, style["color"]))
    numbers = "; numbers: rho" if is_plain and labels else ""
    axes.set(xlabel=f"sharpness (logarithmic{numbers})", ylabel="test accuracy, %", xscale="log")
    _plain_numbers(axes.xaxis)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.legend(
        loc="outside right upper", fontsize="small", title="optimizer", title_fontsize="small",
        alignment="left",
    )  # fmt: skip
    _title(figure, title)
    place_labels(figure, axes, labels, crosses)
    return figure


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, tuple[float, float], str]],
    crosses: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> list[Bbox]:
    """Write labels beside their points, where they hide least of other labels, points and bars.

    Args:
        labels: (text, point, colour) of each label.
        crosses: points with the lengths of their bars, in the units of the axes.

    Returns:
        the boxes of the texts, in pixels.
    """
    figure.draw_without_rendering()  # the axes have no place before that
    pixels = figure.dpi / 72
    points = [axes.transData.transform(point) for _, point, _ in labels]
    marks = []
    for (x, y), (dx, dy) in crosses:
        left, right = (axes.transData.transform((x + sign * dx, y)) for sign in (-1, 1))
        low, high = (axes.transData.transform((x, y + sign * dy)) for sign in (-1, 1))
        middle = axes.transData.transform((x, y))
        for ends, half in (((left, right), 1), ((low, high), 1), ((middle, middle), 4)):
            corners = (ends[0] - half * pixels, ends[1] + half * pixels)
            marks.append(Bbox([*corners]))
    placed: list[Bbox] = []
    inside = axes.get_window_extent()
    for (text, point, colour), here in zip(labels, points, strict=True):
        note = axes.annotate(
            text, point, xytext=(0, 0), textcoords="offset points", fontsize="small",
            color=colour, ha="center", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0,
                        "shrinkB": 3},
        )  # fmt: skip
        size = note.get_window_extent()
        width, height = size.width + 2 * pixels, size.height + 1 * pixels

        def badness(
            offset: tuple[float, float],
            here: Any = here,
            width: float = width,
            height: float = height,
        ) -> tuple[float, float]:
            x, y = here[0] + offset[0] * pixels, here[1] + offset[1] * pixels
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            over = [Bbox.intersection(box, other) for other in (*placed, *marks)]
            hidden = sum(part.width * part.height for part in over if part is not None)
            out = Bbox.intersection(box, inside)
            hidden += width * height - (out.width * out.height if out is not None else 0.0)
            return hidden, math.hypot(*offset)

        offsets = [
            (
                (radius + width / 2 / pixels) * math.cos(angle),
                (radius + height / 2 / pixels) * math.sin(angle),
            )
            for radius in (5, 9, 14, 20, 28, 38)
            for angle in (math.pi * k / 8 for k in range(16))
        ]
        best = min(offsets, key=badness)
        note.set_position(best)
        x, y = here[0] + best[0] * pixels, here[1] + best[1] * pixels
        placed.append(Bbox.from_bounds(x - width / 2, y - height / 2, width, height))
    return placed


def all_plots(
    groups: Sequence[Group], title: str, published: Published
) -> dict[str, Figure | None]:
    """Draw every plot of a task, by its name; None stands for a plot whose figures no run has."""
    return {
        "curves": plot_curves(groups, title),
        "accuracy-rho": plot_against_rho(
            groups, "test_accuracy", "test accuracy, %", title, False, published
        ),
        "sharpness-rho": plot_against_rho(groups, "sharpness", "sharpness", title, True, published),
        "accuracy-sharpness": plot_accuracy_against_sharpness(groups, title),
        "magnitudes": plot_magnitudes(groups, title),
        "norms": plot_norms(groups, title),
        "density": plot_density(groups, title),
        "eigenvalues": plot_eigenvalues(groups, title),
    }
