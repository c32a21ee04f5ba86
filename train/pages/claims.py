"""Say what runs show of the report's claims: paired tests over seeds, and verdicts by them
alone."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from train.pages.groups import Comparison, Group, holm, paired

LEVEL = 0.05
Scale = Callable[[Mapping[int, float]], dict[int, float]]
CLAIMS = {
    "1": "SAM is more accurate than SGD (difference: of the accuracies, in points)",
    "2": "SAM is flatter than SGD (of the logarithms of the sharpness)",
    "3": "SAM is the flatter the larger rho (the same)",
    "4": "SAMMagnitude's sharpness is nearer to SAM's than SAMDirection's is (of the distances, in "
    "logarithms)",
    "5": "SAMMagnitude's accuracy is nearer to SAM's than SAMDirection's is (of the distances)",
    "6": "the share of |g2| > |g1| is above 50% at the end (less 50, in points)",
    "7": "that share rises (last epoch less first, in points)",
    "8": "SGDHess is the flatter the larger rho (of the logarithms of the sharpness)",
    "9": "SGDHess is less accurate than SGD (of the accuracies, in points)",
}
NOTES = f"""\
- difference: mean over the seeds that both have, and its 95% interval, by a paired t-test; the same
  seed has the same first weights and the same order of images. A logarithm lower by 0.69 is half.
- p: two-sided, adjusted by Holm's method for the number of tests of the claim, or of optimizers.
  "Confirmed", "contradicted", "more" and "less" are said where it is below {LEVEL}, nowhere else;
  one seed decides nothing."""


@dataclass(frozen=True)
class Test:
    """A comparison whose sign a claim predicts.

    claim: the number of the claim. compared: what is compared with what, in words. expected: the
    sign that the claim predicts.
    """

    claim: str
    compared: str
    comparison: Comparison
    expected: int


def _log(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log(value) for seed, value in values.items() if value > 0}


def _distance(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    return {seed: abs(ours[seed] - theirs[seed]) for seed in ours if seed in theirs}


def _agree(one: Group, other: Group) -> bool:
    """Return whether both groups have the same values of all keys that both use, except for
    optimizer, rho and backend."""
    ours, theirs = one.recipe, other.recipe
    keys = (ours.keys() & theirs.keys()) - {"opt_name", "rho", "backend"}
    return all(ours[key] == theirs[key] for key in keys)


def baseline(group: Group, groups: Iterable[Group]) -> Group | None:
    """Return the group of SGD, or of the base of `group`, under the same conditions; None if there
    is none."""
    plain = group.recipe.get("base", "sgd")
    alike = (g for g in groups if g.config.opt_name == plain and _agree(g, group))
    return next(alike, None)


def tests_of(groups: Sequence[Group]) -> list[Test]:
    """Return the tests of CLAIMS for which there are runs; the groups are all of one task."""
    found: list[Test] = []

    def add(
        claim: str, compared: str, ours: Mapping[int, float], theirs: Mapping[int, float], sign: int
    ) -> None:
        if (comparison := paired(ours, theirs)) is not None:
            found.append(Test(claim, compared, comparison, sign))

    def of(opt_name: str) -> list[Group]:
        return [g for g in groups if g.config.opt_name == opt_name and g.is_of_the_report]

    def against_sgd(
        claim: str, members: Sequence[Group], figure: str, scale: Scale, sign: int
    ) -> None:
        for group in members:
            if (sgd := baseline(group, groups)) is not None:
                ours, theirs = (scale(g.by_seed(figure)) for g in (group, sgd))
                add(claim, f"{group.label} - {sgd.label}", ours, theirs, sign)

    def falls(claim: str, members: Sequence[Group]) -> None:
        for smaller, larger in _neighbours(members):
            compared = f"{larger.label} - rho {smaller.config.rho:g}"
            add(claim, compared, _log(larger.by_seed("sharpness")),
                _log(smaller.by_seed("sharpness")), -1)  # fmt: skip

    against_sgd("1", of("sam"), "test_accuracy", dict, 1)
    against_sgd("2", of("sam"), "sharpness", _log, -1)
    falls("3", of("sam"))
    spaces: tuple[tuple[str, str, Scale], ...] = (
        ("4", "sharpness", _log),
        ("5", "test_accuracy", dict),
    )
    for claim, figure, scale in spaces:
        for sam in of("sam"):
            alike = [
                [g for g in of(name) if _agree(g, sam) and g.config.rho == sam.config.rho]
                for name in ("sammagnitude", "samdirection")
            ]  # fmt: skip
            for magnitude, direction in zip(*alike, strict=False):
                target = scale(sam.by_seed(figure))
                add(
                    claim,
                    f"distance to {sam.label}",
                    _distance(scale(magnitude.by_seed(figure)), target),
                    _distance(scale(direction.by_seed(figure)), target),
                    -1,
                )
    shown = (g for g in groups if g.is_of_the_report and g.at_epoch("share_second_larger", -1))
    for group in shown:
        last, first = (
            {seed: 100 * value for seed, value in group.at_epoch("share_second_larger", i).items()}
            for i in (-1, 0)
        )
        add("6", group.label, last, dict.fromkeys(last, 50.0), 1)
        if any(len(run["history"]) > 1 for run in group.runs):
            add("7", group.label, last, first, 1)
    falls("8", of("sgdhess"))
    against_sgd("9", of("sgdhess"), "test_accuracy", dict, -1)
    return found


def _neighbours(members: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    """Yield pairs of groups under the same conditions, with one rho and the next larger one."""
    by_rest: dict[str, list[Group]] = {}
    for group in members:
        rest = {key: value for key, value in group.recipe.items() if key != "rho"}
        by_rest.setdefault(str(rest), []).append(group)
    for alike in by_rest.values():
        yield from itertools.pairwise(sorted(alike, key=lambda group: group.config.rho))


def verdict(comparison: Comparison, p: float, expected: int) -> str:
    """Decide by the adjusted p and the sign; `expected` 0 asks which of the two is larger."""
    if comparison.number < 2:
        return "one seed"
    if math.isnan(p) or p >= LEVEL:
        return "not decided"
    if expected == 0:
        return "more" if comparison.mean > 0 else "less"
    return "confirmed" if comparison.mean * expected > 0 else "contradicted"


def interval(comparison: Comparison) -> str:
    """Return text such as +1.13 [-0.42, +2.69]; without the interval where there is none."""
    mean = f"{comparison.mean:+.2f}"
    if math.isnan(comparison.low):
        return mean
    return f"{mean} [{comparison.low:+.2f}, {comparison.high:+.2f}]"


def p_in_words(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def claims_table(groups: Sequence[Group]) -> list[list[str]]:
    """Return a row for each test, head first; [] where there is no test."""
    tests = tests_of(groups)
    rows = []
    for claim in CLAIMS:
        alike = [test for test in tests if test.claim == claim]
        adjusted = holm([test.comparison.p for test in alike])
        for test, p in zip(alike, adjusted, strict=True):
            said = verdict(test.comparison, p, test.expected)
            number = str(test.comparison.number)
            rows.append(
                [claim, test.compared, interval(test.comparison), number, p_in_words(p), said]
            )
    return [["claim", "compared", "difference", "n", "p", "verdict"], *rows] if rows else []


def against_sgd_table(groups: Sequence[Group]) -> list[list[str]]:
    """Return every optimizer's test accuracy minus that of its baseline, head first; return []
    where there is no baseline."""
    found = []
    for group in groups:
        sgd = baseline(group, groups)
        if sgd is None or group.config.opt_name == "sgd":
            continue
        comparison = paired(group.by_seed("test_accuracy"), sgd.by_seed("test_accuracy"))
        if comparison is not None:
            found.append((group.label, sgd.optimizer, comparison))
    adjusted = holm([comparison.p for _, _, comparison in found])
    rows = [
        [
            label,
            other,
            interval(comparison),
            str(comparison.number),
            p_in_words(p),
            verdict(comparison, p, 0),
        ]
        for (label, other, comparison), p in zip(found, adjusted, strict=True)
    ]
    return [["optimizer", "than", "points more", "n", "p", "verdict"], *rows] if rows else []
