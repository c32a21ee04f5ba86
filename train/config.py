"""The typed configuration: YAML and command-line flags with the same keys."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from train.errors import ConfigError

EXPERIMENTS = Path(__file__).parent / "configs"
MODEL_NAMES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wrn28_10", "resnet_small"
)  # fmt: skip


SECTIONS = ("data", "network", "optimizer", "schedule", "run", "sharpness")
ALIASES = {"verify": "verify_steps"}


def _key(
    section: str,
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float = 0.0,
    high: float = math.inf,
    matters: bool = True,
) -> Any:
    """A configuration key.

    Args:
        section: the `a` of `--set a.b=value` and of nested YAML.
        choices: for strings; none: free text.
        low, high: bounds of numbers, both allowed.
        matters: whether the results depend on it, up to rounding.
    """
    meta = {"section": section, "help": help, "choices": tuple(choices), "matters": matters}
    return dataclasses.field(default=default, metadata={**meta, "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. The defaults are the report's protocol for CIFAR-100."""

    dataset: str = _key(
        "data", "cifar100", "data set", choices=("cifar100", "cifar10", "fashion", "digits")
    )
    data_root: str = _key(
        "data", "data", "folder that holds, or receives, the files of the data set", matters=False
    )
    label_noise: float = _key("data", 0.0, "share of the training labels made wrong", high=1.0)
    train_samples: int = _key(
        "data",
        0,
        "training images to use, a random part that is always the same; 0: all",
        high=10**9,
    )
    batch_size: int = _key(
        "data", 256, "images per step, of all processes together", low=2, high=100_000
    )
    model: str = _key("network", "resnet18", "network", choices=MODEL_NAMES)
    precision: str = _key(
        "network", "fp32", "of the passes; bf16: under autocast", choices=("fp32", "bf16")
    )
    channels_last: bool = _key("network", False, "memory format of images and weights")
    compile: bool = _key("network", False, "torch.compile the network")
    cuda_graph: bool = _key(
        "network", False, "record the training step as a CUDA graph, anew in every epoch"
    )
    opt_name: str = _key(
        "optimizer",
        "sgd",
        "optimizer",
        choices=("sgd", "sam", "samdirection", "sammagnitude", "sgdhess"),
    )
    rho: float = _key(
        "optimizer",
        0.05,
        "radius of the perturbation; sgdhess: weight of the curvature",
        high=100.0,
    )
    adaptive: bool = _key("optimizer", False, "ASAM's perturbation, scaled by |w|")
    granularity: str = _key(
        "optimizer",
        "element",
        "what SAMDirection and SAMMagnitude take magnitude and direction over",
        choices=("element", "tensor", "global"),
    )
    backend: str = _key(
        "optimizer",
        "auto",
        "samkernels backend",
        choices=("auto", "native", "triton", "foreach", "reference"),
    )
    lr: float = _key("optimizer", 0.1, "learning rate at the start", high=100.0)
    momentum: float = _key("optimizer", 0.9, "momentum of SGD", high=1.0)
    wd: float = _key("optimizer", 0.001, "weight decay", high=1.0)
    nesterov: bool = _key("optimizer", False, "Nesterov momentum")
    scheduler: str = _key(
        "schedule",
        "cosine",
        "learning rate per epoch: cosine to 0, constant, or times lr_gamma",
        choices=("cosine", "constant", "exponential"),
    )
    lr_gamma: float = _key(
        "schedule", 0.98, "factor per epoch of the exponential scheduler", high=1
    )
    epochs: int = _key("schedule", 200, "passes over the training split", low=1, high=100_000)
    seed: int = _key("run", 0, "of the weights, the order and the augmentation", high=2**31 - 1)
    device: str = _key(
        "run", "auto", "where to train", choices=("auto", "cpu", "cuda"), matters=False
    )
    threads: int = _key(
        "run", 0, "CPU threads; 0: torch's choice, all cores", high=4096, matters=False
    )
    verify_steps: int = _key(
        "run",
        20,
        "(or --verify) first steps that are compared with the reference backend; sgd has none",
        high=1_000_000,
    )
    statistics_every: int = _key(
        "run",
        0,
        "steps from one to the next at which g1, g2 and w are compared, for curves; 0: never",
        high=1_000_000,
    )
    framework_name: str = _key(
        "run",
        "none",
        "where curves go as well (wandb: offline with WANDB_MODE=offline)",
        choices=("none", "tensorboard", "wandb"),
        matters=False,
    )
    resume: bool = _key(
        "run", False, "go on from the folder's last.pt, bit for bit, if it has one", matters=False
    )
    overwrite: bool = _key("run", False, "start over where an unfinished run lies", matters=False)
    output_dir: str = _key(
        "run", "", "folder of the results; empty: runs/ and a name from the keys", matters=False
    )
    sharpness_samples: int = _key(
        "sharpness",
        1024,
        "training images for lambda_max, trace and density of the best checkpoint; 0: none of them",
        high=10**9,
    )
    trace_vectors: int = _key(
        "sharpness", 0, "random vectors for the trace; 0: leave it out", high=10**6
    )
    density_steps: int = _key(
        "sharpness", 0, "Lanczos steps for the spectral density; 0: leave it out", high=10**4
    )
    sharpness_batches: int = _key(
        "sharpness",
        0,
        "augmented batches for the report's sharpness, which has 40; 0: leave it out",
        high=10**6,
    )
    sharpness_batch_size: int = _key(
        "sharpness", 256, "images in each of them", low=1, high=100_000
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # Through the checks whoever made the object; frozen, hence object.__setattr__.
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov=true needs momentum above 0: allowed (0, 1], nearest 0.9")

        if self.opt_name == "sgdhess" and self.compile:
            raise ConfigError(
                "compile=true with opt_name=sgdhess: torch.compile's networks have no second "
                "derivatives; allowed false"
            )
        if self.density_steps == 1:
            raise ConfigError("density_steps=1 gives no density: allowed 0, 2 to 10000; nearest 2")

    @property
    def run_name(self) -> str:
        """Label of a run in tables and plots: the optimizer and what distinguishes it."""
        if self.opt_name == "sgd":
            return "sgd"
        name = f"{self.opt_name}-rho{self.rho:g}"
        if self.opt_name == "sgdhess":
            return name
        if self.opt_name != "sam" and self.granularity != "element":
            name += f"-{self.granularity}"
        return name + ("-adaptive" if self.adaptive else "")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        name = f"{self.dataset}-{self.model}-{self.run_name}-seed{self.seed}"
        return Path(self.output_dir) if self.output_dir else Path("runs") / name

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Where `other` (a saved configuration) asks for other results: "key=theirs, here ours"."""
        found = []
        for name, field in FIELDS.items():
            mine, theirs = getattr(self, name), other.get(name, field.default)
            if field.metadata["matters"] and mine != theirs:
                found.append(f"{name}={theirs} there, {mine} here")
        return found


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def nearest(word: str, known: Iterable[str]) -> str:
    """The most similar of the known words."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def _bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words[str(value).lower()]


def _int(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    # YAML 1.1 reads 1e-3 as text: float() takes it all the same.
    if isinstance(value, bool) or math.isnan(number := float(value)):
        raise ValueError
    return number


def _checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value in the key's type.

    Raises:
        ConfigError: wrong type or out of range; names the key, what is allowed and the nearest.
    """
    name, meta = field.name, field.metadata
    if field.type is str:
        if meta["choices"] and value not in meta["choices"]:
            raise ConfigError(
                f"{name}={value} is not known: allowed {', '.join(meta['choices'])}; "
                f"nearest {nearest(str(value), meta['choices'])}"
            )
        return str(value)
    if field.type is bool:
        try:
            return _bool(value)
        except KeyError:
            raise ConfigError(
                f"{name}={value} is neither true nor false: allowed true, false; "
                f"nearest {nearest(str(value).lower(), ('true', 'false'))}"
            ) from None
    low, high = (f"{meta[bound]:.15g}" for bound in ("low", "high"))
    kind = "a whole number" if field.type is int else "a number"
    try:
        number = _int(value) if field.type is int else _float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{name}={value} is not {kind}: allowed {low} to {high}; default {field.default}"
        ) from None
    if not meta["low"] <= number <= meta["high"]:
        raise ConfigError(
            f"{name}={value} is out of range: allowed {low} to {high}; "
            f"nearest {low if number < meta['low'] else high}"
        )
    return number


def check_keys(keys: Iterable[Any], where: str) -> None:
    """Refuse keys that are not fields of Config.

    Raises:
        ConfigError: names the key, where it stands, the nearest match and all known keys.
    """
    for key in keys:
        if key not in FIELDS:
            known = [*FIELDS, *ALIASES]
            raise ConfigError(
                f"unknown key '{key}' in {where}: did you mean '{nearest(str(key), known)}'? "
                f"Known keys: {', '.join(known)}"
            )


def key_of_path(path: str, where: str) -> str:
    """The key of `section.key`; a key alone is one already.

    Raises:
        ConfigError: there is no such section, or it has no such key.
    """
    section, dot, key = path.rpartition(".")
    key = ALIASES.get(key, key)
    if not dot:
        check_keys([key], where)
        return key
    if section not in SECTIONS:
        raise ConfigError(
            f"unknown section '{section}' of '{path}' in {where}: allowed {', '.join(SECTIONS)}; "
            f"nearest {nearest(section, SECTIONS)}"
        )
    known = [name for name, field in FIELDS.items() if field.metadata["section"] == section]
    if key not in known:
        elsewhere = f"{FIELDS[key].metadata['section']}.{key}" if key in FIELDS else ""
        raise ConfigError(
            f"unknown key '{key}' of section '{section}' in {where}: allowed {', '.join(known)}; "
            f"nearest {elsewhere or nearest(key, known)}"
        )
    return key


def flatten(content: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Sections dissolved, aliases replaced: a mapping from keys of Config to values.

    Raises:
        ConfigError: an unknown section or key.
    """
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                flat[key_of_path(f"{name}.{key}", where)] = inner
        else:
            flat[key_of_path(str(name), where)] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (empty file: no keys).

    Raises:
        ConfigError: not readable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines")
    return content


def named_yaml(name: str, folder: Path, kind: str) -> Path:
    """`folder/name.yaml`.

    Raises:
        ConfigError: there is none; names those that exist and the nearest.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(
            f"unknown {kind} '{name}': allowed {', '.join(known)}; nearest {nearest(name, known)}"
        )
    return folder / f"{name}.yaml"


def parse_flags(arguments: Sequence[str]) -> dict[str, str]:
    """`--key=value`, `--key value`, `--set section.key=value`; the last of equal keys wins.

    A key that is true or false may stand alone: `--resume`.

    Raises:
        ConfigError: an argument without `--`, a flag without a value, or a wrong path in --set.
    """
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is no flag: write --key=value")
        key, equals, value = word[2:].partition("=")
        key = ALIASES.get(key, key)
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif key in FIELDS and FIELDS[key].type is bool:
                value = "true"
            else:
                raise ConfigError(f"--{key} has no value: write --{key}=value")
        if key == "set":
            path, equals, value = value.partition("=")
            if not equals:
                raise ConfigError(f"--set {path} has no value: write --set section.key=value")
            key = key_of_path(path, "--set")
        flags[key] = value
    return flags


def make_config(*layers: tuple[str, Mapping[Any, Any]]) -> Config:
    """Config from (where, mapping) layers; later layers override earlier ones."""
    merged: dict[str, Any] = {}
    for where, layer in layers:
        merged.update(flatten(layer, where))
    return Config(**merged)


def experiment_layers(name: str, below: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The layers of configs/NAME.yaml: those of the file that it extends, then its own.

    Raises:
        ConfigError: there is no such file, or the files extend each other in a circle.
    """
    if name in below:
        raise ConfigError(f"{name}.yaml extends itself: {' -> '.join([*below, name])}")
    path = named_yaml(name, EXPERIMENTS, "experiment")
    content = read_yaml(path)
    base = content.pop("extends", None)
    layers = [] if base is None else experiment_layers(str(base), [*below, name])
    return [*layers, (path.name, content)]


def from_command_line(arguments: Sequence[str]) -> Config:
    """`--experiment=NAME` picks configs/NAME.yaml (default: default); the other flags override."""
    flags = parse_flags(arguments)
    name = flags.pop("experiment", "default")
    # The flags first: a typing error there should not hide behind one in the file.
    check_keys(flags, "the command line")
    return make_config(*experiment_layers(name), ("the command line", flags))


def describe_keys() -> str:
    """One line per key, by section: default, meaning, allowed values."""
    lines = []
    for section in SECTIONS:
        lines.append(f"{section}:")
        for field in FIELDS.values():
            if field.metadata["section"] != section:
                continue
            allowed = ", ".join(field.metadata["choices"])
            if field.type in (int, float):
                allowed = f"{field.metadata['low']:.15g} to {field.metadata['high']:.15g}"
            shown = str(field.default).lower() if field.type is bool else field.default
            detail = f" [{allowed}]" if allowed else ""
            lines.append(f"  --{field.name}={shown}  {field.metadata['help']}{detail}")
    return "\n".join(lines)
