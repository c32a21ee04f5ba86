"""The benchmarks compare equals, and the pages show what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import host, memory_floor, report
from bench.candidates import RHO, SGD_OPTIONS, VARIANTS, candidates, ours, problem
from bench.clock import Clock
from bench.lists import LISTS, numel_of
from bench.names import COMPILED
from bench.peers import CompiledSAM
from bench.side_by_side import summarize
from bench.test_ops import OPS, lists_of, work
from samkernels import ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPES = [torch.Size(shape) for shape in [(8, 3, 3, 3), (8,), (10, 8), (10,)]]
CASES = [(variant, name) for variant in VARIANTS for name in candidates(variant, CPU)]


@pytest.mark.full
@pytest.mark.parametrize(("variant", "name"), CASES)
def test_candidates_compute_the_same(variant: str, name: str) -> None:
    makes = candidates(variant, CPU)
    # What a compiler makes of it does not depend on the compiler, but on what is written there.
    makes[COMPILED] = lambda params: CompiledSAM(params, RHO, "eager", **SGD_OPTIONS)
    given = problem(SHAPES)
    moved = {}
    for which in (name, "reference"):
        moved[which] = given.parameters()
        step = given.step_of(makes[which](moved[which]), moved[which])
        for _ in range(3):
            step()
    for p, expected, start in zip(moved[name], moved["reference"], given.weights, strict=True):
        assert not torch.equal(expected, start)
        # A few roundings of weights of order 0.1.
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)


def test_lists() -> None:
    sizes = {name: (len(shapes()), numel_of(shapes())) for name, shapes in LISTS.items()}
    assert sizes == {
        "ResNet-18": (62, 11_220_132),
        "WRN-28-10": (80, 36_536_884),
        "ViT-B": (152, 86_567_656),  # torchvision's vit_b_16
        "1000 tiny tensors": (1000, 32_020),
    }


@pytest.mark.parametrize("backend", ours(CPU))
@pytest.mark.parametrize("op", OPS)
def test_ops_can_be_repeated(op: str, backend: str) -> None:
    given = problem(SHAPES)
    lists = lists_of(given.weights, given.first_grads, given.second_grads)
    repeated = work(op, lists, backend)
    repeated()
    repeated()
    assert all(torch.isfinite(t).all() for of in lists[:6] for t in of)


def test_peak_bytes_counts_what_is_held_at_a_time() -> None:
    def two_then_one() -> None:
        a = torch.ones(1000)
        b = a.to(torch.float64)
        del a
        b.to(torch.float32)

    assert 12_000 <= Clock(CPU, 16).peak_bytes(two_then_one) < 12_100


def test_memory_of_sam_is_the_backup_and_the_momentum() -> None:
    given = problem(LISTS["ResNet-18"]())
    params = given.parameters()

    def steps() -> None:
        step = given.step_of(candidates("SAM", CPU)["native"](params), params)
        step()
        step()

    # Beside the two lists, a few numbers per tensor.
    assert 2 <= Clock(CPU, 16).peak_bytes(steps) / given.nbytes < 2.01


def test_summary_divides_within_rounds() -> None:
    seconds = {name: [2.0, 4.0, 8.0] for name in ("native", "foreach")}
    seconds["native"] = [1.0, 2.0, 4.0]
    seconds["pass"] = [0.1, 0.2, 0.4]
    rows = {row["name"]: row for row in summarize(seconds)}
    assert rows["native"]["passes"] == pytest.approx(10)
    assert rows["foreach"]["times_native"] == pytest.approx(2)
    assert rows["foreach"]["median_ms"] == pytest.approx(4000)


@pytest.mark.skipif(
    memory_floor.why_unavailable() is not None, reason=str(memory_floor.why_unavailable())
)
def test_the_memory_floor_is_a_sam_step() -> None:
    step, (w, _, g1, g2, momentum_buffer) = memory_floor.memory_floor_step(1000)
    expected, expected_buffer = w.clone(), momentum_buffer.clone()
    old = torch.empty_like(w)
    ops.perturb_([expected], [g1], [old], rho=RHO)
    ops.sgd_([expected], [old], ops.Mix([g2]), [expected_buffer], **SGD_OPTIONS)
    step()
    # The norm's last bit may differ.
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(momentum_buffer, expected_buffer, rtol=1e-6, atol=1e-7)


# -- the suite and its report ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one machine, made by the commands of the documentation, cut short."""
    folder = tmp_path_factory.mktemp("bench") / "some-machine"
    folder.mkdir()
    cases = [
        "bench/test_ops.py::test_op[norms-1000 tiny tensors-float32-native]",
        "bench/test_steps.py::test_sam[1000 tiny tensors-float32-native]",
        "bench/test_steps.py::test_sam[ResNet-18-float32-native]",
        "bench/test_ops.py::test_op[sgd-ResNet-18-float32-native]",
        "bench/test_steps.py::test_variants[ASAM-native]",
        "bench/test_growth.py::test_elements[10000-native]",
        "bench/test_growth.py::test_tensors[4-native]",
        "bench/test_growth.py::test_threads[1]",
    ]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device=cpu"]
    in_turn = [sys.executable, "-m", "bench.side_by_side", "--list", "1000 tiny tensors"]
    for command in (
        [*pytest_, *cases, f"--benchmark-json={folder / 'suite.json'}"],
        [*in_turn, "--rounds=2", "--output", str(folder / "tiny.json")],
    ):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.full
def test_the_page_shows_what_was_measured(results: Path, tmp_path: Path) -> None:
    files = [str(results / name) for name in ("suite.json", "tiny.json")]
    report.main([*files, "--output", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    (machine,) = report.read([Path(file) for file in files])
    (case,) = machine.of("step", variant="SAM", list="ResNet-18")
    row = next(
        line
        for line in page.split("**SAM, ResNet-18")[1].splitlines()
        if line.startswith("| native ")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith(f"{case['warm_ms'][1]:.3g} ")
    assert float(cells[4]) == pytest.approx(
        case["cold_ms"][1] * case["GB_per_s"][1] * 1e6 / (40 * 11_220_132), abs=0.006
    )
    assert cells[5] == "2.00"
    for text in ("some-machine", "commit: ", "MHz as found", "no slower than the reference"):
        assert text in page
    images = [line.rpartition("(")[2].rstrip(")") for line in page.splitlines() if "![" in line]
    assert len(images) == 5
    for image in images:
        assert (tmp_path / image).stat().st_size > 5000


def test_a_file_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "x.json")])
    assert "x.json is neither of pytest-benchmark nor" in capsys.readouterr().err


def test_what_differs_between_files_is_shown_of_all() -> None:
    machine = report.Machine("m")
    for commit in ("abc", "abc", "def"):
        machine.add({"commit": commit, "cores": 2})
    assert report.environment_line(machine) == "commit: abc, def; cores: 2"


def test_goals_are_reached_or_not() -> None:
    found = []
    for passes, times in ((10.1, 1.0), (10.0, 0.99)):
        large = [{"name": "native", "passes": passes, "times_native": 1.0}]
        tiny = [*large, {"name": "reference", "passes": 0, "times_native": times}]
        lists = {"ResNet-18": large, "1000 tiny tensors": tiny}
        in_turn = [{"list": of, "rows": rows} for of, rows in lists.items()]
        machine = report.Machine("m", in_turn=in_turn)
        found.append([row[2] for row in report.goals_table(machine)[1:]])
    assert found == [["not reached", "reached"], ["reached", "not reached"]]


def test_the_distance_to_the_floor_is_said() -> None:
    rows = [{"name": memory_floor.NAME, "times_native": 0.8}, {"name": "native"}]
    (said,) = report._to_the_floor({"list": "ResNet-18", "rows": rows})
    assert "1.25 times" in said
    assert report._to_the_floor({"list": "ResNet-18", "rows": rows[1:]}) == []


# -- what is committed -----------------------------------------------------------------------------

COMMITTED = sorted((ROOT / "bench" / "results" / "cpu-2-cores").glob("*.json"))


def test_readme_shows_the_committed_result() -> None:
    readme = (ROOT / "README.md").read_text()
    file = Path("bench/results/cpu-2-cores/sam_step_resnet18.json")
    (machine,) = report.read([ROOT / file])
    part = report.readme_part(machine, file, Path("docs/images/cpu-2-cores-resnet-18.png"))
    assert report.with_part(readme, part) == readme
    assert (ROOT / "docs/images/cpu-2-cores-resnet-18.png").exists()


def test_the_page_is_that_of_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    files = [file.relative_to(ROOT) for file in COMMITTED]
    assert (
        report.page(report.read(files), files, tmp_path) == Path("docs/benchmarks.md").read_text()
    )


def test_results_come_with_what_they_need() -> None:
    needed = {"commit", "processor", "threads", "torch", "python"}
    for file in COMMITTED:
        content: dict[str, Any] = json.loads(file.read_text())
        found = content.get("environment") or content["machine_info"]["environment"]
        assert needed <= found.keys(), file


def test_the_page_shows_the_host_time_that_was_measured() -> None:
    result = json.loads((ROOT / "bench/results/cpu-2-cores-epyc/host.json").read_text())
    page = (ROOT / "docs" / "kernels.md").read_text()
    for name, case in result["cases"].items():
        row = f"| {name} | {case['sam_us']:.0f} | {case['base_us']:.0f} | {case['ratio']:.2f} |\n"
        assert row in page
    environment = result["environment"]
    for what in (environment["processor"], environment["torch"], f"of {result['rounds']} steps"):
        assert what in page


def test_host_time_is_that_of_both_optimizers() -> None:
    sam, base = host.measure("62 tensors in 2 groups", rounds=3)
    assert len(sam) == len(base) == 3
    assert min(*sam, *base) > 0
