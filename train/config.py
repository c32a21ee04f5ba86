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


def _key(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float = 0.0,
    high: float = math.inf,
) -> Any:
    """A configuration key: `choices` for strings (none: free text), [low, high] for numbers."""
    meta = {"help": help, "choices": tuple(choices), "low": low, "high": high}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. The defaults are the report's protocol for CIFAR-100."""

    dataset: str = _key(
        "cifar100", "data set", choices=("cifar100", "cifar10", "fashion", "digits")
    )
    data_root: str = _key("data", "folder that holds, or receives, the files of the data set")
    label_noise: float = _key(0.0, "share of the training labels made wrong", high=1.0)
    model: str = _key("resnet18", "network", choices=MODEL_NAMES)
    opt_name: str = _key("sgd", "optimizer", choices=("sgd", "sam", "samdirection", "sammagnitude"))
    rho: float = _key(0.05, "radius of the perturbation", high=100.0)
    adaptive: bool = _key(False, "ASAM's perturbation, scaled by |w|")
    granularity: str = _key(
        "element",
        "what SAMDirection and SAMMagnitude take magnitude and direction over",
        choices=("element", "tensor", "global"),
    )
    backend: str = _key(
        "auto", "samkernels backend", choices=("auto", "native", "foreach", "reference")
    )
    lr: float = _key(0.1, "learning rate at the start", high=100.0)
    momentum: float = _key(0.9, "momentum of SGD", high=1.0)
    wd: float = _key(0.001, "weight decay", high=1.0)
    nesterov: bool = _key(False, "Nesterov momentum")
    scheduler: str = _key("cosine", "learning rate per epoch: cosine to 0", choices=("cosine",))
    epochs: int = _key(200, "passes over the training split", low=1, high=100_000)
    batch_size: int = _key(256, "images per step", low=2, high=100_000)
    seed: int = _key(0, "of the weights, the order and the augmentation", high=2**31 - 1)
    device: str = _key("auto", "where to train", choices=("auto", "cpu", "cuda"))
    threads: int = _key(0, "CPU threads; 0: torch's choice, all cores", high=4096)
    verify_steps: int = _key(
        20, "first steps of a SAM run that are compared with the reference backend", high=1_000_000
    )
    sharpness_samples: int = _key(
        1024, "training images for lambda_max of the best checkpoint; 0: leave it out", high=10**9
    )
    output_dir: str = _key("", "folder of the results; empty: runs/ and a name from the keys")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # Through the checks whoever made the object; frozen, hence object.__setattr__.
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov=true needs momentum above 0: allowed (0, 1], nearest 0.9")

    @property
    def run_name(self) -> str:
        """Label of a run in tables and plots: the optimizer and what distinguishes it."""
        if self.opt_name == "sgd":
            return "sgd"
        name = f"{self.opt_name}-rho{self.rho:g}"
        if self.opt_name != "sam" and self.granularity != "element":
            name += f"-{self.granularity}"
        return name + ("-adaptive" if self.adaptive else "")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        name = f"{self.dataset}-{self.model}-{self.run_name}-seed{self.seed}"
        return Path(self.output_dir) if self.output_dir else Path("runs") / name


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
            raise ConfigError(
                f"unknown key '{key}' in {where}: did you mean '{nearest(str(key), FIELDS)}'? "
                f"Known keys: {', '.join(FIELDS)}"
            )


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
    """`--key=value` and `--key value` as a mapping; the last of equal keys wins.

    Raises:
        ConfigError: an argument without `--`, or a flag without a value.
    """
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is no flag: write --key=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value: write --{key}=value")
            value = rest.pop(0)
        flags[key] = value
    return flags


def make_config(*layers: tuple[str, Mapping[str, Any]]) -> Config:
    """Config from (where, mapping) layers; later layers override earlier ones."""
    merged: dict[str, Any] = {}
    for where, layer in layers:
        check_keys(layer, where)
        merged.update(layer)
    return Config(**merged)


def from_command_line(arguments: Sequence[str]) -> Config:
    """`--experiment=NAME` picks configs/NAME.yaml (default: default); the other flags override."""
    flags = parse_flags(arguments)
    path = named_yaml(flags.pop("experiment", "default"), EXPERIMENTS, "experiment")
    # The flags first: a typing error there should not hide behind one in the file.
    check_keys(flags, "the command line")
    return make_config((path.name, read_yaml(path)), ("the command line", flags))


def describe_keys() -> str:
    """One line per key: default, meaning, allowed values."""
    lines = []
    for field in FIELDS.values():
        allowed = ", ".join(field.metadata["choices"])
        if field.type in (int, float):
            allowed = f"{field.metadata['low']:.15g} to {field.metadata['high']:.15g}"
        shown = str(field.default).lower() if field.type is bool else field.default
        detail = f" [{allowed}]" if allowed else ""
        lines.append(f"  --{field.name}={shown}  {field.metadata['help']}{detail}")
    return "\n".join(lines)
