"""Read the typed configuration: YAML and command-line flags have the same keys."""

import contextlib
import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from train.settings.registry import DATASETS, MODELS, OPTIMIZERS, PASSES, TIMM, optimizers_with
from train.shared.errors import ConfigError

EXPERIMENTS = Path(__file__).parents[1] / "configs"
PRESETS = {"bf16": {"precision": "bf16", "channels_last": "true"}}

SECTIONS = ("data", "network", "optimizer", "schedule", "run", "sharpness")
# Keys have these other names, too; most come from the report's command line and YAML files.
ALIASES = {
    "verify": "verify_steps",
    "model_name": "model",
    "data_name": "dataset",
    "weight_decay": "wd",
    "sch_name": "scheduler",
    "gamma": "lr_gamma",
}
# The report's YAML files have these sections; some are keys here, which then hold no mapping.
REPORT_SECTIONS = (
    "dataloader", "model", "opt_hyperparameter", "scheduler", "sch_hyperparameter",
    "trainer", "logging",
)  # fmt: skip
# These keys of the report's files can have one value only; None says that any value will do.
REPORT_ONLY: dict[str, Any] = {"num_workers": None, "sch": None, "split": [0.9, 0.1]}

# Each name in `when` has here the smallest and largest value of its numbers, and their count.
POLICIES = {"periodic": (1, 1e9, 1), "from": (0, 1e9, 1), "bernoulli": (0, 1, 1),
            "norm": (-1e9, 1e9, 2)}  # fmt: skip
POLICY_EXAMPLES = ("always", "periodic:10", "from:0", "bernoulli:0.5", "norm:0:0")

TWO_PASSES = optimizers_with(steps=("two passes",))
SAM_FAMILY = optimizers_with(steps=("two passes", "one pass"))
WITH_SGD = ("opt_name", tuple(name for name in OPTIMIZERS if name != "adamw"))
OF_SAM = ("opt_name", SAM_FAMILY)
OF_KERNELS = ("opt_name", tuple(n for n, row in OPTIMIZERS.items() if row.step != "plain"))


def _key(
    section: str,
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float = 0.0,
    high: float = math.inf,
    effect: str = "training",
    used_if: tuple[str, Sequence[str]] | None = None,
    short: str | None = None,
    varies: bool = False,
) -> Any:
    """Make a configuration key.

    Args:
        section: the `a` of `--set a.b=value` and of nested YAML.
        choices: the strings that are allowed; none: free text.
        low, high: the smallest and the largest number that are allowed.
        effect: "training": the trained weights depend on it; "measuring": what is measured of them
            does; "none": up to rounding, neither.
        used_if: (key, values): this key is in use only where that key has one of the values.
        short: the word before the value in names of runs; None: the key's name.
        varies: whether some optimizers have another default; see OptimizerEntry.usual.
    """
    meta: dict[str, Any] = {"section": section, "help": help, "choices": tuple(choices)}
    meta |= {"default": default, "varies": varies}
    meta |= {"effect": effect, "low": low, "high": high, "used_if": used_if, "short": short}
    return dataclasses.field(default=None if varies else default, metadata=meta)


def _own_key(name: str, default: Any, help: str, **others: Any) -> Any:
    """Make a key that is an argument of some optimizers only."""
    rule = ("opt_name", optimizers_with(key=name))
    return _key("optimizer", default, help, used_if=rule, **others)


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. The defaults are the report's protocol for CIFAR-100."""

    dataset: str = _key(
        "data",
        "cifar100",
        "data set; folder: class folders in data_root/train and data_root/test",
        choices=tuple(DATASETS),
    )
    data_root: str = _key(
        "data",
        "data",
        "folder that holds, or receives, the files of the data set",
        effect="none",
        short="",
    )
    image_size: int = _key(
        "data", 0, "of dataset=folder: pixels of a side to resize to; 0: as they are", high=4096
    )
    augmentation: bool = _key("data", True, "crop, flip and Cutout, as the data set has them")
    label_noise: float = _key(
        "data", 0.0, "share of the training labels made wrong", high=1.0, short="noise"
    )
    label_noise_kind: str = _key(
        "data",
        "symmetric",
        "into any other class, or into the one that looks like it",
        choices=("symmetric", "asymmetric"),
        short="",
    )
    label_noise_file: str = _key(
        "data",
        "",
        "instead: labels for all training images of the files, .npy or text",
        short="labels",
    )
    train_samples: int = _key(
        "data",
        0,
        "training images to use, a random part that is always the same; 0: all",
        high=10**9,
        short="samples",
    )
    batch_size: int = _key(
        "data",
        256,
        "images per step, of all processes together",
        low=2,
        high=100_000,
        short="batch",
    )
    model: str = _key("network", "resnet18", "network", choices=(*MODELS, f"{TIMM}NAME"), short="")
    precision: str = _key(
        "network",
        "fp32",
        "of the passes; tf32: torch's default, convolutions in TF32; bf16: under autocast",
        choices=("fp32", "tf32", "bf16"),
        short="",
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
        choices=tuple(OPTIMIZERS),
    )
    base: str = _key(
        "optimizer",
        "sgd",
        "optimizer under those of the SAM family",
        choices=("sgd", "adamw"),
        used_if=OF_SAM,
        short="",
    )
    rho: float = _key(
        "optimizer",
        0.05,
        "radius of the perturbation; sgdhess: weight of the curvature",
        high=100.0,
        used_if=OF_KERNELS,
        varies=True,
    )
    rho_end: float = _key(
        "optimizer",
        1.0,
        "share of rho that is left where lr is 0, as rho follows lr (GSAM's); 1: rho stays",
        high=1.0,
        used_if=OF_SAM,
    )
    sparsity: float = _key(
        "optimizer",
        0.0,
        "share of the weights, drawn from the seed, that are never perturbed (Sparse SAM)",
        high=1.0,
        used_if=OF_SAM,
    )
    adaptive: bool = _key("optimizer", False, "ASAM's perturbation, scaled by |w|", used_if=OF_SAM)
    scaling: str = _key(
        "optimizer",
        "auto",
        "of the perturbation: by |w| + eta, or by the norm of each tensor; auto: as adaptive says",
        choices=("auto", "none", "elementwise", "tensor"),
        used_if=OF_SAM,
    )
    eta: float = _key(
        "optimizer", 0.0, "of scaling by |w| + eta", high=100.0, used_if=OF_SAM, varies=True
    )
    subset: str = _key(
        "optimizer",
        "all",
        "parameters that are perturbed; norm: those of normalisation layers (SAM-ON)",
        choices=("all", "norm"),
        used_if=OF_SAM,
    )
    norm: str = _key(
        "optimizer",
        "global",
        "that divides the perturbation: over all tensors, of each, or none (USAM)",
        choices=("global", "tensor", "none"),
        used_if=OF_SAM,
    )
    when: str = _key(
        "optimizer",
        "always",
        "steps that perturb: always, periodic:K (every K-th), from:STEP, bernoulli:P (at random), "
        "norm:L1:L2 (of large gradients: AE-SAM)",
        used_if=OF_SAM,
        short="",
    )
    granularity: str = _own_key(
        "granularity",
        "element",
        "what SAMDirection and SAMMagnitude take magnitude and direction over",
        choices=("element", "tensor", "global"),
        short="",
    )
    k: int = _own_key(
        "k",
        1,
        "steps from one random vector of sgdhess, or second pass of looksam, to the next",
        low=1,
        high=1_000_000,
        varies=True,
    )
    alpha: float = _own_key(
        "alpha",
        0.4,
        "weight of what gsam, gradientnormpenalty, looksam and saner add",
        low=-100.0,
        high=100.0,
        varies=True,
    )
    gamma: float = _own_key("gamma", 0.9, "weight of wsam's sharpness, below 1", high=1.0)
    decouple: bool = _own_key("decouple", True, "wsam's sharpness apart from the momentum")
    max_norm: float = _own_key("max_norm", 0.0, "wsam: clips g1 and g2; 0: no clipping", high=1e6)
    normed: bool = _own_key("normed", False, "gradientnormpenalty as its authors' code has it")
    sigma: float = _own_key(
        "sigma", 1.0, "share of the average that friendlysam takes off", low=-100.0, high=100.0
    )
    lmbda: float = _own_key("lmbda", 0.9, "of friendlysam's moving average", high=1.0)
    theta: float = _own_key("theta", 0.9, "weight of g1 in vasso's moving average", high=1.0)
    a: float = _own_key("a", 1.0, "angle of xsam: 0 is g1's, 1 is sam", low=-10.0, high=10.0)
    perturbation: str = _key(
        "optimizer",
        "global",
        "of torchrun's processes: one for all, one for each (m-sharpness), or one for each group",
        choices=("global", "local", "group"),
        used_if=("opt_name", TWO_PASSES),
        short="",
    )
    perturbation_group: int = _key(
        "optimizer",
        0,
        "processes in a group of perturbation=group",
        high=65536,
        used_if=("perturbation", ("group",)),
        short="of",
    )
    backend: str = _key(
        "optimizer",
        "auto",
        "samkernels backend",
        choices=("auto", "native", "triton", "foreach", "reference"),
        used_if=OF_KERNELS,
        short="",
    )
    lr: float = _key("optimizer", 0.1, "learning rate at the start", high=100.0)
    momentum: float = _key("optimizer", 0.9, "momentum of SGD", high=1.0, used_if=WITH_SGD)
    wd: float = _key("optimizer", 0.001, "weight decay", high=1.0)
    nesterov: bool = _key("optimizer", False, "Nesterov momentum", used_if=WITH_SGD)
    scheduler: str = _key(
        "schedule",
        "cosine",
        "learning rate per epoch: cosine to 0, constant, or times lr_gamma",
        choices=("cosine", "constant", "exponential"),
        short="",
    )
    lr_gamma: float = _key(
        "schedule",
        0.98,
        "factor per epoch of the exponential scheduler",
        high=1,
        used_if=("scheduler", ("exponential",)),
        short="gamma",
    )
    warmup_epochs: int = _key(
        "schedule",
        0,
        "epochs that come before the scheduler's, in which the learning rate rises to lr",
        high=100_000,
        short="warmup",
    )
    label_smoothing: float = _key(
        "schedule",
        0.0,
        "share of each training label given to all classes alike",
        high=1.0,
        short="smoothing",
    )
    epochs: int = _key("schedule", 200, "passes over the training split", low=1, high=100_000)
    seed: int = _key("run", 0, "of the weights, the order and the augmentation", high=2**31 - 1)
    device: str = _key(
        "run", "auto", "where to train", choices=("auto", "cpu", "cuda"), effect="none"
    )
    threads: int = _key(
        "run", 0, "CPU threads; 0: torch's choice, all cores", high=4096, effect="none"
    )
    verify_steps: int = _key(
        "run",
        20,
        "(or --verify) first steps that are compared with the reference backend; sgd has none",
        high=1_000_000,
        effect="measuring",
    )
    statistics_every: int = _key(
        "run",
        0,
        "steps from one to the next at which g1, g2 and w are compared, for curves; 0: never",
        high=1_000_000,
        effect="measuring",
    )
    test_every: int = _key(
        "run",
        0,
        "epochs from one test to the next, for curves; 0: only at the end",
        high=100_000,
        effect="measuring",
    )
    log_every: int = _key(
        "run",
        10,
        "steps from one to the next whose losses are logged; 0: none",
        high=1_000_000,
        effect="none",
    )
    framework_name: str = _key(
        "run",
        "none",
        "where curves go as well (wandb: offline with WANDB_MODE=offline)",
        choices=("none", "tensorboard", "wandb"),
        effect="none",
    )
    project_name: str = _key("run", "samkernels", "project of wandb", effect="none")
    group: str = _key("run", "", "group of wandb; empty: data set and model", effect="none")
    tags: str = _key("run", "", "tags of wandb, with commas between", effect="none")
    resume: bool = _key(
        "run", False, "go on from the folder's last.pt, bit for bit, if it has one", effect="none"
    )
    overwrite: bool = _key(
        "run", False, "start over where a run lies, finished or not", effect="none"
    )
    output_dir: str = _key(
        "run", "", "folder of the results; empty: runs/ and a name from the keys", effect="none"
    )
    sharpness_samples: int = _key(
        "sharpness",
        1024,
        "training images for lambda_max, trace and density of the best checkpoint; 0: none of them",
        high=10**9,
        effect="measuring",
    )
    trace_vectors: int = _key(
        "sharpness",
        0,
        "random vectors for the trace; 0: leave it out",
        high=10**6,
        effect="measuring",
    )
    density_steps: int = _key(
        "sharpness",
        0,
        "Lanczos steps for the spectral density; 0: leave it out",
        high=10**4,
        effect="measuring",
    )
    sharpness_batches: int = _key(
        "sharpness",
        0,
        "augmented batches for the report's sharpness, which has 40; 0: leave it out",
        high=10**6,
        effect="measuring",
    )
    sharpness_batch_size: int = _key(
        "sharpness", 256, "images in each of them", low=1, high=100_000, effect="measuring"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # Values are checked, whoever made the object; it is frozen, hence object.__setattr__.
            value = getattr(self, field.name)
            if value is None and field.metadata["varies"]:
                value = self.usual(field.name)
            object.__setattr__(self, field.name, _checked(field, value))
        object.__setattr__(
            self,
            "when",
            ":".join([when[0], *map("{:g}".format, when[1:])])
            if (when := self.policy)
            else "always",
        )
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov=true needs momentum above 0: allowed (0, 1], nearest 0.9")

        if self.label_noise and self.label_noise_file:
            raise ConfigError(
                f"label_noise={self.label_noise:g} with a label_noise_file, which has the wrong "
                "labels: allowed one of the two"
            )
        if self.image_size and self.dataset != "folder":
            raise ConfigError(
                f"image_size={self.image_size} with dataset={self.dataset}, whose images have "
                "their size: allowed 0, or dataset=folder"
            )
        if self.base != "sgd" and self.opt_name not in SAM_FAMILY:
            raise ConfigError(
                f"base={self.base} with opt_name={self.opt_name}, which has no base: allowed sgd; "
                f"opt_name={self.base} is {self.base} by itself"
            )
        if OPTIMIZERS[self.opt_name].every and self.policy:
            raise ConfigError(
                f"when={self.when} with opt_name={self.opt_name}, whose "
                f"{OPTIMIZERS[self.opt_name].every} says in which steps there is a second pass: "
                "allowed always"
            )
        if (self.perturbation == "group") != (self.perturbation_group > 0):
            raise ConfigError(
                f"perturbation={self.perturbation} with perturbation_group="
                f"{self.perturbation_group}: allowed group with 1 or more, global and local with 0"
            )
        if self.perturbation != "global" and self.opt_name not in TWO_PASSES:
            raise ConfigError(
                f"perturbation={self.perturbation} with opt_name={self.opt_name}, which has none: "
                "allowed global"
            )
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs} of epochs={self.epochs} leave none for the "
                f"scheduler: allowed 0 to {self.epochs - 1}; nearest {self.epochs - 1}"
            )
        if OPTIMIZERS[self.opt_name].step == "hessian" and self.compile:
            raise ConfigError(
                f"compile=true with opt_name={self.opt_name}: torch.compile's networks have no "
                "second derivatives; allowed false"
            )
        if self.resume and self.overwrite:
            raise ConfigError(
                "resume=true with overwrite=true: allowed is one of them, to go on or to start over"
            )
        if self.density_steps == 1:
            raise ConfigError("density_steps=1 gives no density: allowed 0, 2 to 10000; nearest 2")

    def uses(self, name: str) -> bool:
        """Return whether the other keys leave this one in use: rho is not where opt_name is sgd."""
        rule = FIELDS[name].metadata["used_if"]
        return rule is None or getattr(self, rule[0]) in rule[1]

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the keys in use that the weights depend on; equal recipes give the same weights.

        Class folders are known by the name of their folder, wherever it lies.
        """
        found = {
            name: getattr(self, name)
            for name, field in FIELDS.items()
            if field.metadata["effect"] == "training" and self.uses(name)
        }
        if self.dataset == "folder":
            found["data_root"] = Path(self.data_root).resolve().name
        return found

    @property
    def measures(self) -> dict[str, Any]:
        """Return the keys on which the measurements depend, beside the recipe."""
        return {
            name: getattr(self, name)
            for name, field in FIELDS.items()
            if field.metadata["effect"] == "measuring"
        }

    def usual(self, name: str) -> Any:
        """Return the default that the key has with this optimizer."""
        return OPTIMIZERS[self.opt_name].usual.get(name, FIELDS[name].metadata["default"])

    @property
    def policy(self) -> tuple[Any, ...] | None:
        """Return the name and the numbers of `when`; None stands for always.

        Raises:
            ConfigError: `when` is no policy that is known.
        """
        name, *texts = self.when.split(":")
        if self.when == "always":
            return None
        numbers: list[float] = []
        with contextlib.suppress(ValueError):
            numbers = [int(t) if name in ("periodic", "from") else float(t) for t in texts]
        low, high, count = POLICIES.get(name, (0, 0, 0))
        if not count or len(numbers) != count or not all(low <= n <= high for n in numbers):
            raise ConfigError(
                f"when={self.when} is not known: allowed always, periodic:K with K from 1, "
                "from:STEP with STEP from 0, bernoulli:P with P from 0 to 1, norm:L1:L2; nearest "
                f"{nearest(name, POLICY_EXAMPLES)}"
            )
        return name, *numbers

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of batches of so many training images; the last may be smaller."""
        return math.ceil(images / self.batch_size)

    @property
    def passes(self) -> float:
        """Return the average number of gradients of the model's loss that a step takes; for
        when=from:STEP and when=norm:L1:L2, return the largest number."""
        row = OPTIMIZERS[self.opt_name]
        passes = PASSES[row.step]
        if row.step != "two passes":
            return passes
        name, number, *_ = self.policy or ("always", 1)
        share = {"periodic": 1 / (number or 1), "bernoulli": number}.get(name, 1.0)
        return 1 + share / (getattr(self, row.every) if row.every else 1)

    @property
    def run_name(self) -> str:
        """Return a run's label: the optimizer, rho, and the values that are not the defaults."""
        rho = f"-rho{self.rho:g}" if self.uses("rho") else ""
        return self.opt_name + rho + self.departures("optimizer", ("opt_name", "rho"))

    @property
    def full_name(self) -> str:
        """Return the run's name among all others: data set, model, run_name, the rest, seed."""
        rest = (section for section in SECTIONS if section != "optimizer")
        left_out = ("dataset", "model", "seed")
        departures = "".join(self.departures(section, left_out) for section in rest)
        name = f"{self.dataset}-{named_value('model', self.model)}-{self.run_name}{departures}"
        if len(name) > 200:  # a file name has 255 bytes
            name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return f"{name}-seed{self.seed}"

    def departures(self, section: str, without: Sequence[str]) -> str:
        """Return the keys of the section whose values are not the defaults, as a part of a name."""
        found = ""
        for name, value in self.recipe.items():
            field = FIELDS[name]
            if field.metadata["section"] == section and name not in without:
                if value != self.usual(name):
                    found += f"-{named_value(name, value)}"
        return found

    @property
    def folder(self) -> Path:
        """Return the folder of the results."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.full_name

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Say which keys of the recipe `other`, a saved configuration, has with other values."""
        theirs = Config(**known_keys(other)).recipe
        ours = self.recipe
        return [
            f"{name}={theirs[name]} there, {ours[name]} here"
            for name in FIELDS
            if name in ours and name in theirs and ours[name] != theirs[name]
        ]


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def known_keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keys of a saved configuration that Config still has."""
    return {name: value for name, value in saved.items() if name in FIELDS}


def named_value(name: str, value: Any) -> str:
    """Return key and value as a part of a file name, such as wd0.01, nesterov, no-nesterov."""
    short = FIELDS[name].metadata["short"]
    short = name if short is None else short
    if isinstance(value, bool):
        return short if value else f"no-{short}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = text.replace(":", "", 1).replace(":", "_") if name == "when" else text
    if safe := re.sub(r"[^\w.+-]+", "_", text):
        text = safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return short + text


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the most similar of the known words."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def _bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words[str(value).lower()]


def _int(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    # YAML 1.1 reads 1e-3 as text, which float() takes.
    if isinstance(value, bool) or math.isnan(number := float(value)):
        raise ValueError
    return number


def _checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Return the value in the key's type.

    Raises:
        ConfigError: its type or range is wrong; the message names the key and the allowed values,
            and the nearest of these or the default.
    """
    name, meta = field.name, field.metadata
    if field.type is str:
        # Any name with timm's prefix passes: timm checks it when the model is made.
        timm = f"{TIMM}NAME" in meta["choices"] and str(value).startswith(TIMM)
        if meta["choices"] and value not in meta["choices"] and not timm:
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
            f"{name}={value} is not {kind}: allowed {low} to {high}; default {meta['default']}"
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
        ConfigError: a key is unknown; the message names the key, its place, the nearest known key
            and all others.
    """
    for key in keys:
        if key not in FIELDS:
            known = [*FIELDS, *ALIASES]
            raise ConfigError(
                f"unknown key '{key}' in {where}: did you mean '{nearest(str(key), known)}'? "
                f"Known keys: {', '.join(known)}"
            )


def key_of_path(path: str, where: str) -> str:
    """Return the key that `section.key`, or a key or alias alone, names.

    Raises:
        ConfigError: there is no such key, no such section, or the section has no such key.
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
    """Dissolve sections and replace aliases: return a mapping from keys of Config to values.

    The sections of the report's YAML files are dissolved as well.

    Raises:
        ConfigError: a section or key is unknown, or a key of the report's files has a value that
            is not possible here.
    """
    flat: dict[str, Any] = {}
    length = None

    def take(mapping: Mapping[Any, Any]) -> None:
        nonlocal length
        for name, value in mapping.items():
            if isinstance(value, dict) and name in REPORT_SECTIONS:
                take(value)
            elif isinstance(value, dict):
                for key, inner in value.items():
                    if isinstance(inner, dict) and key in REPORT_SECTIONS:
                        take(inner)
                    else:
                        flat[key_of_path(f"{name}.{key}", where)] = inner
            elif name == "T_max":
                length = value
            elif name in REPORT_ONLY:
                if REPORT_ONLY[name] not in (None, value):
                    raise ConfigError(
                        f"{name}={value} in {where}: allowed here is {REPORT_ONLY[name]}, the "
                        "report's"
                    )
            else:
                flat[key_of_path(str(name), where)] = value

    take(content)
    epochs = flat.get("epochs", FIELDS["epochs"].default)
    if length not in (None, epochs):
        raise ConfigError(
            f"T_max={length} in {where}: the cosine ends with the last epoch; allowed, the number "
            f"of epochs: {epochs}"
        )
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file has no keys.

    Raises:
        ConfigError: the file is not readable, is not YAML, or holds no mapping.
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
    """Return the path `folder/name.yaml`; a name that ends with .yaml or .yml is a path itself.

    Raises:
        ConfigError: there is no such file; the message names those that exist and the nearest.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ConfigError(f"there is no file '{name}': give the path of a {kind}'s YAML file")
        return Path(name)
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(
            f"unknown {kind} '{name}': allowed {', '.join(known)}, or the path of a .yaml file; "
            f"nearest {nearest(name, known)}"
        )
    return folder / f"{name}.yaml"


def folders_and_flags(
    arguments: Sequence[str], allowed: Mapping[str, str]
) -> tuple[list[Path], dict[str, str]]:
    """Read the arguments of a command that takes folders and a few flags.

    Args:
        allowed: the flags, each with the word that stands for its value in the message.

    Raises:
        ConfigError: another flag is among the arguments.
    """
    words: list[str] = []
    flags = parse_flags(arguments, words)
    if unknown := [name for name in flags if name not in allowed]:
        known = ", ".join(f"--{name}={value}" for name, value in allowed.items())
        raise ConfigError(f"unknown flag --{unknown[0]}: allowed {known}")
    return list(map(Path, words)), flags


def parse_flags(arguments: Sequence[str], words: list[str] | None = None) -> dict[str, str]:
    """Read `--key=value`, `--key value`, `--set section.key=value`; the last of equal keys wins.

    A key that is true or false may stand alone: `--resume`. `--preset=NAME` stands for the keys of
    that entry of PRESETS.

    Args:
        words: takes the arguments that are neither flags nor values; None: there must be none.

    Raises:
        ConfigError: an argument is no flag where none may be, a flag has no value, a path in --set
            is wrong, or a preset is unknown.
    """
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if words is None:
                raise ConfigError(f"'{word}' is no flag: write --key=value")
            words.append(word)
            continue
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
        if key == "preset":
            if value not in PRESETS:
                raise ConfigError(
                    f"preset={value} is not known: allowed {', '.join(PRESETS)}; nearest "
                    f"{nearest(value, PRESETS)}"
                )
            flags |= PRESETS[value]
            continue
        flags[key] = value
    return flags


def make_config(*layers: tuple[str, Mapping[Any, Any]]) -> Config:
    """Make a Config from (where, mapping) layers; later layers override earlier ones."""
    merged: dict[str, Any] = {}
    for where, layer in layers:
        merged.update(flatten(layer, where))
    return Config(**merged)


def experiment_layers(name: str, below: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return the layers of a file: those of the file that it `extends`, then its own.

    Args:
        name: the NAME of configs/NAME.yaml, or the path of a YAML file.

    Raises:
        ConfigError: there is no such file, or the files extend each other in a circle.
    """
    if name in below:
        raise ConfigError(f"{name} extends itself: {' -> '.join([*below, name])}")
    path = named_yaml(name, EXPERIMENTS, "experiment")
    content = read_yaml(path)
    base = content.pop("extends", None)
    if base is not None and Path(str(base)).suffix in (".yaml", ".yml"):
        base = path.parent / str(base)
    layers = [] if base is None else experiment_layers(str(base), [*below, name])
    return [*layers, (path.name, content)]


def from_command_line(arguments: Sequence[str]) -> Config:
    """Make the Config of a command line: `--experiment=NAME` picks configs/NAME.yaml (default:
    default), or a YAML file by its path; the other flags override it."""
    flags = parse_flags(arguments)
    name = flags.pop("experiment", "default")
    # The flags are checked first: a typing error in them should not hide behind one in the file.
    check_keys(flags, "the command line")
    return make_config(*experiment_layers(name), ("the command line", flags))


def describe_keys() -> str:
    """Return a line for each key, by section, with its default, meaning and allowed values."""
    lines = []
    for section in SECTIONS:
        lines.append(f"{section}:")
        for field in FIELDS.values():
            if field.metadata["section"] != section:
                continue
            allowed = ", ".join(field.metadata["choices"])
            if field.type in (int, float):
                allowed = f"{field.metadata['low']:.15g} to {field.metadata['high']:.15g}"
            shown = field.metadata["default"]
            shown = str(shown).lower() if field.type is bool else shown
            if field.metadata["varies"]:
                others = {
                    n: r.usual[field.name] for n, r in OPTIMIZERS.items() if field.name in r.usual
                }
                allowed = ", ".join(
                    [allowed, *(f"{n}: {v:g} by default" for n, v in others.items())]
                )
            detail = f" [{allowed}]" if allowed else ""
            lines.append(f"  --{field.name}={shown}  {field.metadata['help']}{detail}")
    return "\n".join(lines)
