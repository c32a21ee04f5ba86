"""What the assembler makes of the CUDA sources, for Ampere, Hopper and Blackwell: no spills, no
local memory, loads and stores of 128 bits, and enough warps to hide latency. Needs nvcc, no GPU."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted(path for path in (ROOT / "csrc/cuda").glob("*.cu") if path.name != "op_table.cu")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


class Code(NamedTuple):
    """The machine code of a function."""

    opcodes: dict[int, str]  # by address, with their modifiers, such as LDG.E.128
    registers: dict[int, list[int]]  # of each instruction, what it writes first
    loops: list[range]  # the addresses between the target of a backward branch and the branch

    def count(self, pattern: str, addresses: range | None = None) -> int:
        return sum(
            re.fullmatch(pattern, opcode) is not None
            for address, opcode in self.opcodes.items()
            if addresses is None or address in addresses
        )

    def loads(self, loop: range) -> list[int]:
        """The bytes of each load from global memory in a loop."""
        found = [self.opcodes[address] for address in loop if address in self.opcodes]
        return [bytes_of_load(opcode) for opcode in found if opcode.startswith("LDG.")]

    def loads_in_flight(self, loop: range) -> int:
        """How many loads are issued before the first instruction that needs what one has loaded:
        there a warp waits, and issues nothing behind it."""
        loaded: set[int] = set()
        count = 0
        for address in loop:
            opcode, registers = self.opcodes.get(address, ""), self.registers.get(address, [])
            if not opcode.startswith("LDG."):
                if loaded.intersection(registers):
                    break
                continue
            if loaded.intersection(registers[1:]):
                break
            loaded.update(range(registers[0], registers[0] + max(1, bytes_of_load(opcode) // 4)))
            count += 1
        return count


def bytes_of_load(opcode: str) -> int:
    match = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
    return int(match[1]) // 8 if match else 4


class Kernel(NamedTuple):
    """One kernel of one architecture, as the assembler reports it and the disassembler shows it."""

    name: str  # demangled
    arch: str
    registers: int
    shared_bytes: int  # static; the launcher asks for no dynamic ones
    stack_bytes: int
    spilled_bytes: int
    threads: int  # of a block: what the launch bounds promise
    code: Code

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.name}"


# Occupancy


class Limits(NamedTuple):
    """Of one multiprocessor: CUDA C++ Programming Guide, technical specifications per compute
    capability, and NVIDIA's occupancy calculator for the granularities."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 64 * 1024
    registers_granularity: int = 256  # a warp's registers come in such portions
    warps_granularity: int = 4  # one for each of the four schedulers
    shared_granularity: int = 128
    shared_reserved: int = 1024  # per block, for the system


LIMITS = {
    "80": Limits(shared_bytes=164 * 1024),
    "90": Limits(shared_bytes=228 * 1024),
    "100": Limits(shared_bytes=228 * 1024),
}


def occupancy(limits: Limits, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that can be resident with blocks of this kind."""
    warps = -(-threads // 32)
    portion = limits.registers_granularity
    of_warp = -(-registers * 32 // portion) * portion
    warps_with_registers = limits.registers // of_warp
    warps_with_registers -= warps_with_registers % limits.warps_granularity
    portion = limits.shared_granularity
    of_block = -(-(shared_bytes + limits.shared_reserved) // portion) * portion
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        warps_with_registers // warps,
        limits.shared_bytes // of_block,
    )
    return blocks * warps / limits.warps


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared_bytes", "expected"),
    [
        ("90", 256, 32, 0, 1.0),
        ("90", 256, 40, 1096, 0.75),  # 51 warps' worth of registers, 48 after rounding
        ("90", 256, 64, 0, 0.5),
        ("90", 256, 65, 0, 0.375),  # rounded up to 72 registers
        ("90", 256, 255, 0, 0.125),
        ("90", 32, 32, 0, 0.5),  # 32 blocks
        ("90", 1024, 65, 0, 0.0),  # cannot be launched
        ("80", 256, 32, 48 * 1024, 0.375),  # three blocks of 49 KiB in 164 KiB
        ("100", 256, 32, 48 * 1024, 0.5),  # four in 228 KiB
    ],
)
def test_occupancy(
    arch: str, threads: int, registers: int, shared_bytes: int, expected: float
) -> None:
    assert occupancy(LIMITS[arch], threads, registers, shared_bytes) == expected


# What is expected of a kernel. Each check returns what is wrong, "" if nothing is.


def local_memory(kernel: Kernel) -> str:
    """Registers that did not suffice, or arrays with an index that is not known at compile time."""
    accesses = kernel.code.count(r"(LDL|STL)\b.*")
    if kernel.stack_bytes or kernel.spilled_bytes or accesses:
        return (
            f"{kernel}: {kernel.stack_bytes} bytes of stack, {kernel.spilled_bytes} spilled, "
            f"{accesses} accesses to local memory"
        )
    return ""


def few_warps(kernel: Kernel) -> str:
    share = occupancy(LIMITS[kernel.arch], kernel.threads, kernel.registers, kernel.shared_bytes)
    if share < 0.5:
        return (
            f"{kernel}: {share:.0%} of the warps fit, with {kernel.registers} registers, "
            f"{kernel.shared_bytes} bytes of shared memory and {kernel.threads} threads"
        )
    return ""


VECTOR_LOAD = r"LDG\.(.*\.)?(128|256)\b.*"
VECTOR_STORE = r"STG\.(.*\.)?(128|256)\b.*"


def narrow_accesses(kernel: Kernel) -> str:
    """There is a loop that reads and writes each list 128 bits at a time."""
    if "CountStepsKernel" in kernel.name:
        return ""  # one number for each tensor
    needed = lists_of(kernel.name)
    found = [
        (kernel.code.count(VECTOR_LOAD, loop), kernel.code.count(VECTOR_STORE, loop))
        for loop in kernel.code.loops
    ]
    if any(loads >= needed[0] and stores >= needed[1] for loads, stores in found):
        return ""
    return (
        f"{kernel}: needs a loop with {needed[0]} loads and {needed[1]} stores of 128 bits, one "
        f"for each list; its loops have {found}"
    )


def element_bytes(name: str) -> int:
    match = re.search(r"Functor<(\w+)", name)
    assert match is not None, f"{name}: no functor tells the dtype"
    return 4 if match[1] == "float" else 2


def loops_of_loads(kernel: Kernel, width: int) -> list[range]:
    """Those whose loads are all of `width` bytes, with the most of them first. (Sums of doubles,
    behind the loops over tensors, load 8.)"""
    loops = [loop for loop in kernel.code.loops if set(kernel.code.loads(loop)) == {width}]
    return sorted(loops, key=lambda loop: len(kernel.code.loads(loop)), reverse=True)


COPY = re.compile(r"RestoreFunctor|MixFunctor<\w+, false>")


def slow_misaligned_loops(kernel: Kernel) -> str:
    """Where one list is misaligned, and all are accessed 4 bytes or an element at a time: two loads
    of each list are in flight at least, and an element takes no more than 1.5 times as many
    instructions as with 16 bytes, or twice as many where it has 2 bytes. (Not in a copy, which has
    nothing else than accesses, nor in one that is scaled.)"""
    if "CountStepsKernel" in kernel.name:
        return ""
    lists, size = lists_of(kernel.name)[0], element_bytes(kernel.name)

    def instructions_per_element(loop: range) -> float:
        loads = kernel.code.loads(loop)
        return kernel.code.count(r".*", loop) / (sum(loads) / size / lists)

    wide = instructions_per_element(loops_of_loads(kernel, 16)[0])
    for width in {4, size}:
        loop = loops_of_loads(kernel, width)[0]
        in_flight = kernel.code.loads_in_flight(loop)
        narrow = instructions_per_element(loop)
        factor = 1.5 if width == 4 else 2
        if in_flight < 2 * lists or (narrow > factor * wide and not COPY.search(kernel.name)):
            return (
                f"{kernel}: {in_flight} loads of {width} bytes in flight for {lists} lists, "
                f"{narrow:.1f} instructions per element, {wide:.1f} with 16 bytes"
            )
    return ""


def serial_sums(kernel: Kernel) -> str:
    """All loads of 16 bytes of a loop over a tensor are in flight at a time."""
    loop = loops_of_loads(kernel, 16)[0]
    loads, in_flight = len(kernel.code.loads(loop)), kernel.code.loads_in_flight(loop)
    return "" if in_flight == loads >= 3 else f"{kernel}: {in_flight} of {loads} loads in flight"


# Of each element: fused multiply-adds in double, and conversions to it.
DOUBLE_WORK = {"1, false": (1, 1), "1, true": (2, 2), "2, false": (3, 2), "3, false": (4, 3)}


def needless_double_work(kernel: Kernel) -> str:
    """One operation in double for each sum, and no more conversions than there are factors: GPUs
    for graphics do 64 times as many in float."""
    match = re.search(r"DotsFunctor<\w+, ([^<>]*)>", kernel.name)
    assert match is not None, f"{kernel.name}: no functor of sums"
    fused, converted = DOUBLE_WORK[match[1]]
    lists, size = lists_of(kernel.name)[0], element_bytes(kernel.name)
    for width in {16, 4, size}:
        for loop in loops_of_loads(kernel, width):
            elements = sum(kernel.code.loads(loop)) // size // lists
            found = [
                kernel.code.count(pattern, loop)
                for pattern in (r"DFMA.*", r"F2F\.F64\.F32.*", r"D(MUL|ADD|SETP|MNMX).*")
            ]
            if found != [fused * elements, converted * elements, 0]:
                return f"{kernel}: {found} operations in double for {elements} elements"
    return ""


def lists_of(name: str) -> tuple[int, int]:
    """How many lists a kernel reads and writes, from its functor: csrc/ops.h says which."""
    match = re.search(r"(\w+)Functor<([^<>]*)>", name)
    assert match is not None, f"{name}: no functor tells which op this is"
    op, flags = match[1], [argument.split(")")[-1] for argument in match[2].split(", ")[1:]]
    if op == "Dots":
        return int(flags[0]) + (flags[1] == "true"), 0  # weights
    if op == "Perturb":
        return 2, 2
    if op == "Restore":
        return 1, 1
    if op == "Mix":
        return 1 + (flags[0] == "true"), 1  # y
    if op == "SgdHess":
        has_buffer, starts = (flag == "true" for flag in flags)
        return 3 + (has_buffer and not starts), 1 + has_buffer
    if op == "Sgd":
        has_y, has_buffer = (flag == "true" for flag in flags)
        return 2 + has_y + has_buffer, 1 + has_buffer
    assert op == "Adam", f"{name}: say here how many lists {op} reads and writes"
    return 4 + (flags[0] == "true"), 3


# Compiling and reading


def tool(name: str) -> str:
    """A tool of the CUDA toolkit: from PATH, else the one that comes with Triton."""
    if path := shutil.which(name):
        return path
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None, f"{name} was not found, nor Triton"
    path = Path(triton.origin).parent / "backends/nvidia/bin" / name
    assert path.exists(), f"{name} was not found on PATH, nor in {path.parent}"
    return str(path)


def demangled(names: list[str]) -> list[str]:
    for filter_ in ("cu++filt", "c++filt"):
        if shutil.which(filter_):
            return output_of([filter_], "\n".join(names)).splitlines()
    raise AssertionError("neither cu++filt nor c++filt was found")


def output_of(command: list[str], text: str | None = None) -> str:
    result = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stdout}"
    return result.stdout


REPORT = re.compile(
    r"entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compiled(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """The kernels of a source file."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    # The flags of CMakeLists.txt, and the assembler's report.
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-Werror=all-warnings"]
    report = output_of(
        [str(NVCC), *flags, "-cubin", f"-arch=sm_{arch}", "-o", str(cubin), str(source)]
    )
    code = code_of(output_of([tool("cuobjdump"), "-sass", str(cubin)]))
    threads = threads_of(output_of([tool("cuobjdump"), "-elf", str(cubin)]))
    entries = list(REPORT.finditer(report))
    names = [entry["name"] for entry in entries]
    assert names and set(names) == set(code) == set(threads), f"{source}: {names}"
    return [
        Kernel(
            name=name,
            arch=arch,
            registers=int(entry["registers"]),
            shared_bytes=int(m[1]) if (m := re.search(r"(\d+) bytes smem", entry["rest"])) else 0,
            stack_bytes=int(entry["stack"]),
            spilled_bytes=int(entry["stores"]) + int(entry["loads"]),
            threads=threads[entry["name"]],
            code=code[entry["name"]],
        )
        for entry, name in zip(entries, demangled(names), strict=True)
    ]


def code_of(sass: str) -> dict[str, Code]:
    """The functions of a listing."""
    _, *functions = re.split(r"\n\s*Function : ", sass)
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
    codes = {}
    for text in functions:
        opcodes, registers, loops = {}, {}, []
        for match in line.finditer(text):
            address, opcode = int(match[1], 16), match[2]
            opcodes[address] = opcode
            registers[address] = [int(r) for r in re.findall(r"\bR(\d+)\b", match[3])]
            target = re.search(r"\b0x[0-9a-f]+$", match[3].rstrip())
            if opcode.startswith("BRA") and target and int(target[0], 16) < address:
                loops.append(range(int(target[0], 16), address + 1))
        codes[text.split()[0]] = Code(opcodes, registers, loops)
    return codes


def threads_of(elf: str) -> dict[str, int]:
    """The most threads that a block of each kernel may have, from its launch bounds."""
    _, *kernels = re.split(r"\n\.nv\.info\.", elf)
    threads = {}
    for text in kernels:
        bounds = re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+) (\w+) (\w+)", text)
        assert bounds is not None, f"{text.split()[0]}: no launch bounds"
        x, y, z = (int(value, 16) for value in bounds.groups())
        threads[text.split()[0]] = x * y * z
    return threads


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Kernel]]:
    """By source and architecture; each pair is compiled once, two at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    pairs = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda pair: compiled(*pair, folder), pairs))
    return {(pair[0].stem, pair[1]): result for pair, result in zip(pairs, results, strict=True)}


every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)
every_source = pytest.mark.parametrize("source", [path.stem for path in SOURCES])


@every_arch
@every_source
def test_every_dtype_has_a_kernel(
    kernels: dict[tuple[str, str], list[Kernel]], source: str, arch: str
) -> None:
    names = " ".join(kernel.name for kernel in kernels[source, arch])
    assert all(f"Functor<{dtype}" in names for dtype in ("float", "__half", "__nv_bfloat16"))


@every_arch
@every_source
@pytest.mark.parametrize("check", [local_memory, narrow_accesses, few_warps, slow_misaligned_loops])
def test_no_kernel_is_slow_by_construction(
    kernels: dict[tuple[str, str], list[Kernel]],
    source: str,
    arch: str,
    check: Callable[[Kernel], str],
) -> None:
    findings = [finding for kernel in kernels[source, arch] if (finding := check(kernel))]
    assert not findings, "\n".join(findings)


@every_arch
@pytest.mark.parametrize("source", ["dots"])
@pytest.mark.parametrize("check", [needless_double_work, serial_sums])
def test_no_sum_is_slow_by_construction(
    kernels: dict[tuple[str, str], list[Kernel]],
    source: str,
    arch: str,
    check: Callable[[Kernel], str],
) -> None:
    test_no_kernel_is_slow_by_construction(kernels, source, arch, check)


# Mutants: the checks find what they are for

MUTANTS = """
template <typename T> struct RestoreFunctor { T* out; const T* in; };
template <typename T, int, bool> struct DotsFunctor { double* out; const T* in; };

// An index that is not known at compile time: the array goes to local memory.
template <typename F> __global__ void __launch_bounds__(256) Indexed(F f, int k) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[(i * k) & 63] = f.in[i * k];
  for (int i = 0; i < 64; ++i) f.out[i] = values[(i + k) & 63];
}

// One element at a time.
template <typename F> __global__ void __launch_bounds__(256) Scalar(F f, int k) {
  for (int i = threadIdx.x; i < k; i += 256) f.out[i] = f.in[i];
}

// 100 KiB of shared memory: one block fits on Ampere, two on the others.
template <typename F> __global__ void __launch_bounds__(128) Shared(F f, int k) {
  __shared__ float4 values[48 * 64];
  for (int i = threadIdx.x; i < 48 * 64; i += 128) values[i] = ((const float4*)f.in)[i * k];
  __syncthreads();
  for (int i = threadIdx.x; i < 48 * 64; i += 128) ((float4*)f.out)[i] = values[i ^ k];
}

// Where vectors do not fit, one element after the other.
template <typename F> __global__ void __launch_bounds__(256) Serial(F f, int k, bool aligned) {
  if (aligned) {
#pragma unroll 1
    for (int i = threadIdx.x; i < k; i += 256) ((float4*)f.out)[i] = ((const float4*)f.in)[i];
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < k; i += 256) f.out[i] = f.in[i];
  }
}

// Products and sums apart, and a vector at a time.
template <typename F> __global__ void __launch_bounds__(256) Apart(F f, int k) {
  double sum = 0.0;
#pragma unroll 1
  for (int i = threadIdx.x; i < k; i += 256) {
    const float4 x = ((const float4*)f.in)[i];
    for (double y : {x.x, x.y, x.z, x.w}) sum += y * y;
  }
  f.out[threadIdx.x] = sum;
}

template __global__ void Indexed(RestoreFunctor<float>, int);
template __global__ void Scalar(RestoreFunctor<float>, int);
template __global__ void Shared(RestoreFunctor<float>, int);
template __global__ void Serial(RestoreFunctor<float>, int, bool);
template __global__ void Apart(DotsFunctor<float, 1, false>, int);
"""


MUTANT_NAMES = ("Indexed", "Scalar", "Shared", "Serial", "Apart")


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    folder = tmp_path_factory.mktemp("mutants")
    source = folder / "mutants.cu"
    source.write_text(MUTANTS)
    found = compiled(source, "80", folder)
    return {name: k for k in found for name in MUTANT_NAMES if name in k.name}


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        ("Indexed", local_memory),
        ("Scalar", narrow_accesses),
        ("Shared", few_warps),
        ("Serial", slow_misaligned_loops),
        ("Apart", serial_sums),
        ("Apart", needless_double_work),
    ],
)
def test_a_kernel_that_is_slow_by_construction_is_found(
    mutants: dict[str, Kernel], mutant: str, check: Callable[[Kernel], str]
) -> None:
    assert check(mutants[mutant])
