"""The plans: which steps there are, in order of worth. A rehearsal takes the same steps, files,
environment and order; what differs where there is no GPU is written beside it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.runner import ROOT, Step

LIMITS = {"first": 420.0, "again": 225.0, "cifar": 225.0}  # seconds
CARRIED = ROOT / ".gpu"  # what travels beside the sources: see bench/gpu/prepare.py
VARIANTS, IMAGES = "variants.tgz", "cifar100"  # in it

LONG_LISTS = ("WRN-28-10", "ViT-L")
PROFILED_LISTS = ("ViT-L", "ResNet-18")
OPTIMIZERS = ("sgd", "sam", "samdirection", "sammagnitude")

Groups = list[list[Step]]

# Which tests are chosen, and of which files.
CUDA_TESTS = ("not triton", "test_cuda.py")
NATIVE_TESTS = (
    "cuda-native or cuda_and_cpu or test_ops_random or test_backends",
    "test_ops.py", "test_ops_adam.py", "test_ops_sgd_hess.py", "test_ops_random.py",
    "test_optim_devices.py", "test_backends.py",
)  # fmt: skip
TRITON_TESTS = (
    "cuda-triton-float32 or (test_cuda and triton) or captured_step_is_replayed",
    "test_ops.py", "test_ops_adam.py", "test_ops_sgd_hess.py", "test_cuda.py", "test_triton.py",
)  # fmt: skip

# Counters of one pass: with more of them a kernel is run again and again, and what the caches hold
# is no longer what the step left there.
METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "gpu__time_duration.sum",
    "launch__registers_per_thread",
)
NCU = (
    "ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
    "--cache-control", "none", "--profile-from-start", "off", "--kernel-name-base", "demangled",
    "--kernel-name", "regex:samkernels", "--metrics", ",".join(METRICS),
)  # fmt: skip
# Each tensor an allocation of its own: one element too far, and the tool notices.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Context:
    """Where a plan runs.

    Attributes:
        evidence: the folder that is packed.
        work: the folder for what is not.
        carried: the folder that was prepared beforehand; it may be missing.
    """

    evidence: Path
    work: Path
    carried: Path = CARRIED
    rehearse: bool = False

    def bench(self, module: str, *arguments: str | Path) -> tuple[str, ...]:
        """A module of bench.gpu, which knows rehearsals."""
        command = (sys.executable, "-m", f"bench.gpu.{module}", *map(str, arguments))
        return (*command, "--rehearse") if self.rehearse else command

    def tests(self, name: str, cap: float, workers: int, chosen: str, *files: str) -> Step:
        """Tests that need a GPU; a rehearsal collects them as if there were one."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark", "--maxfail=25"]
        command += ["-p", "bench.gpu.outcomes", f"--outcomes={self.evidence / name}.jsonl"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
        command += [f"-k={chosen}", *(f"tests/{file}" for file in files)]
        if self.rehearse:
            command += ["--collect-only", "-p", "bench.gpu.pretend"]
        return Step(name, cap, tuple(command))

    def every_op(self, *options: str) -> tuple[str, ...]:
        device = "cpu" if self.rehearse else "cuda"
        return (sys.executable, "-m", "tests.sanitized", "native", device, *options)

    def sanitizer(self, tool: str, cap: float, *options: str) -> Step:
        watch = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options)
        return Step(tool, cap, (*watch, *self.every_op("--brief")), ALONE)

    def overlooked(self, cap: float) -> Step:
        """A read past the end, on purpose: 3996 bytes, and behind them is nobody's memory. The
        program may end with an error of its own, as it finds one."""
        command = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no")
        lie = ("--lie", "read", "--numel", "1000")
        found = "Invalid __global__ read"
        return Step("memcheck_lie", cap, (*command, *self.every_op(*lie)), ALONE, expect=found)

    def training_steps(self, cap: float, *options: str) -> Step:
        file = f"--benchmark-json={self.evidence / 'training.json'}"
        # A warning must not cost a figure.
        pytest = (sys.executable, "-m", "pytest", "-q", "-Wdefault", "-p", "no:cacheprovider")
        where = ["--device=cuda"]
        if self.rehearse:
            where = ["--device=cpu", "--batch=2", "--quick", "-k=SGD or native"]
        return Step("training", cap, (*pytest, "bench/test_training.py", file, *options, *where))

    def speed(self, cap: float, plan: str) -> list[Step]:
        """Alone on the GPU."""
        cores = ("--cores", self.carried / VARIANTS)
        return [Step("speed", cap, self.bench("speed", plan, self.evidence, *cores))]

    def begin(self) -> Groups:
        """The machine, and a core that serves it: the carried one, else one that is built here."""
        build = (sys.executable, "-m", "bench.gpu.prepare")
        if self.rehearse:  # the core that is there stays
            build = (sys.executable, "-c", "print('here the core would be built')")
        return [
            [Step("facts", 20, self.bench("facts", "machine", self.evidence))],
            [Step("core", 40, self.bench("facts", "core", self.evidence))],
            [Step("build", 110, build, unless="core")],
            [Step("built", 30, self.bench("facts", "core", self.evidence), unless="core")],
        ]

    def smoke(self) -> list[Step]:
        env = {"CUDA_LAUNCH_BLOCKING": "1"}
        return [Step("smoke", 45, self.every_op("--brief"), env)]

    def ncu(self, cap: float) -> Groups:
        """By list of parameters; one after the other, since a kernel must have the GPU alone."""
        return [
            [Step(f"ncu_{name}", cap, (*NCU, *self.bench("ncu", "--list", name)))]
            for name in PROFILED_LISTS
        ]


def first(here: Context) -> Groups:
    memcheck = here.sanitizer("memcheck", 110, "--report-api-errors", "no")
    initcheck = here.sanitizer("initcheck", 60)
    return [
        *here.begin(),
        # Does each kernel launch, and end?
        here.smoke(),
        # Right, side by side: nothing is timed meanwhile, and compilers fill the idle cores.
        [
            here.tests("tests_cuda", 110, 5, *CUDA_TESTS),
            memcheck,
            here.sanitizer("racecheck", 110),
            here.overlooked(90),
            *(
                Step(
                    f"compile_{name}",
                    75,
                    here.bench("speed", "compile", here.evidence, "--list", name),
                )
                for name in LONG_LISTS
            ),
        ],
        here.speed(150, "first"),
        *here.ncu(40),
        [here.tests("tests_native", 80, 12, *NATIVE_TESTS)],
        [here.training_steps(45)],
        [here.tests("tests_triton", 70, 10, *TRITON_TESTS)],
        [initcheck],
    ]


def again(here: Context) -> Groups:
    """After something was mended: the same, shorter."""
    return [
        *here.begin(),
        here.smoke(),
        [
            here.tests("tests_cuda", 60, 8, *CUDA_TESTS),
            here.sanitizer("memcheck", 60, "--report-api-errors", "no"),
            here.sanitizer("racecheck", 60),
        ],
        here.speed(75, "again"),
        *here.ncu(25),
        [here.tests("tests_native", 60, 12, *NATIVE_TESTS)],
    ]


def cifar(here: Context) -> Groups:
    """ResNet-18 on CIFAR-100 with every optimizer, in bfloat16."""
    images, data = here.carried / IMAGES, here.work / "data"
    runs = [
        [
            Step(
                f"cifar_{name}",
                60,
                here.bench("cifar", "train", name, data, here.work / "runs", here.evidence),
            )
        ]
        for name in OPTIMIZERS
    ]
    return [
        *here.begin(),
        [Step("images", 30, here.bench("cifar", "images", images, data, here.evidence))],
        [here.training_steps(60, "--precision=bf16", "--batch=256")],
        *runs,
    ]


PLANS: dict[str, Callable[[Context], Groups]] = {"first": first, "again": again, "cifar": cifar}
