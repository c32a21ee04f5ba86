"""Lightning, Accelerate and the Hugging Face Trainer: how they call optimizers, each against the
loop written out, bit for bit. The classes are those of docs/recipes.md."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from samkernels import SAM, SAMDirection, frozen_batchnorm_stats
from tests.optim_helpers import snapshot, unchanged
from tests.recipes import forget_accelerate, run, weights

pytestmark = [
    # What the frameworks say of themselves, of small data, and of a machine without a GPU.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
FP16 = partial(torch.autocast, "cpu", torch.float16)

page_of = functools.cache(run)  # for the classes that a recipe defines
default_sam = partial(SAM, rho=0.05, lr=0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(
    model: nn.Module,
    steps: list[list[tuple[Tensor, Tensor]]],
    make_optimizer: Callable[..., SAM] = default_sam,
    *,
    precision: str = "fp32",
    clip: float = 0.0,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> list[Tensor]:
    """The weights after a loop as docs/recipes.md has it; a step has one or more micro-batches."""
    context = {"fp32": nullcontext, "bf16": BF16, "fp16": FP16}[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    optimizer = make_optimizer(model.parameters())
    scheduler = schedule and schedule(optimizer)
    for micro_batches in steps:

        def backward(micro_batches: list[tuple[Tensor, Tensor]] = micro_batches) -> None:
            for x, y in micro_batches:
                with context():
                    loss = cross_entropy(model(x), y) / len(micro_batches)
                scaler.scale(loss).backward()

        backward()
        optimizer.first_step()
        with frozen_batchnorm_stats(model):
            backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return snapshot(model.parameters())


# -- Lightning -------------------------------------------------------------------------------------

AUTOMATIC = "Lightning, automatic optimization"
MANUAL = "Lightning, manual optimization"


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning")


def lightning_run(
    name: str,
    make_optimizer: Callable[..., SAM] | None = None,
    *,
    precision: str = "fp32",
    **options: Any,
) -> SimpleNamespace:
    """The module of a recipe and a trainer with other options; and what the loop is to have."""
    import lightning
    from lightning.pytorch.plugins import MixedPrecision

    page = page_of(name)
    torch.manual_seed(1)
    model = page.Classifier()
    if make_optimizer:
        model.configure_optimizers = lambda: make_optimizer(model.parameters())
    if precision == "fp16":
        # What precision="16-mixed" is on a GPU; on the CPU, Lightning takes bfloat16 instead.
        options["plugins"] = [MixedPrecision("16-mixed", "cpu")]
    else:
        options["precision"] = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"max_epochs": 1, **dict.fromkeys(quiet, False), **options}
    return SimpleNamespace(
        model=model,
        twin=copy.deepcopy(model.network),
        trainer=lightning.Trainer(accelerator="cpu", **options),
        loader=DataLoader(page.batches, batch_size=None),
        steps=[[batch] for batch in page.batches],
    )


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=48)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lightning_automatic(lightning: Any, precision: str) -> None:
    result = lightning_run(AUTOMATIC, precision=precision)
    result.trainer.fit(result.model, result.loader)
    assert result.trainer.global_step == 48
    expected = train(result.twin, result.steps, precision=precision, schedule=cosine)
    assert unchanged(weights(result), expected)
    assert unchanged(result.model.network.buffers(), list(result.twin.buffers()))


def test_lightning_automatic_with_a_grad_scaler_says_what_is_missing(lightning: Any) -> None:
    result = lightning_run(AUTOMATIC, precision="fp16")
    with pytest.raises(RuntimeError, match=r"SAM\.step\(\) needs two gradients"):
        result.trainer.fit(result.model, result.loader)
    assert unchanged(weights(result), snapshot(result.twin.parameters()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lightning_manual(lightning: Any, precision: str) -> None:
    result = lightning_run(MANUAL, precision=precision)
    result.trainer.fit(result.model, result.loader)
    assert result.trainer.global_step == 48
    expected = train(result.twin, result.steps, precision=precision)
    assert unchanged(weights(result), expected)
    assert unchanged(result.model.network.buffers(), list(result.twin.buffers()))


def test_lightning_clips_both_gradients(lightning: Any) -> None:
    """Nearly the same as clipping g2: a norm leaves the direction of g1."""
    result = lightning_run(AUTOMATIC, gradient_clip_val=0.5)
    result.trainer.fit(result.model, result.loader)
    expected = train(result.twin, result.steps, clip=0.5, schedule=cosine)
    for p, q in zip(weights(result), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "precision"), [(AUTOMATIC, "fp32"), (AUTOMATIC, "bf16"), (MANUAL, "fp16")]
)
def test_lightning_with_max_grad_norm(lightning: Any, name: str, precision: str) -> None:
    make = partial(default_sam, max_grad_norm=0.5)
    result = lightning_run(name, make, precision=precision)
    result.trainer.fit(result.model, result.loader)
    start = copy.deepcopy(result.twin)
    expected = train(result.twin, result.steps, make, precision=precision)
    assert unchanged(weights(result), expected)
    assert not unchanged(expected, train(start, result.steps, precision=precision))


@pytest.mark.parametrize("cls", [SAM, SAMDirection])
@pytest.mark.parametrize("name", [AUTOMATIC, MANUAL])
def test_lightning_resumes_with_the_same_bits(lightning: Any, name: str, cls: type[SAM]) -> None:
    make = partial(cls, base_optimizer=torch.optim.AdamW, rho=0.05, lr=0.01)
    whole, first, second = (lightning_run(name, make, max_epochs=n) for n in (2, 1, 2))
    whole.trainer.fit(whole.model, whole.loader)
    first.trainer.fit(first.model, first.loader)
    first.trainer.save_checkpoint("checkpoint.ckpt")
    second.trainer.fit(second.model, second.loader, ckpt_path="checkpoint.ckpt", weights_only=True)
    assert second.trainer.global_step == 96
    assert not unchanged(weights(first), weights(whole))
    assert unchanged(weights(second), weights(whole))


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def accelerate(fresh_accelerate: None) -> Any:
    return pytest.importorskip("accelerate")


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def test_accelerate_in_bfloat16(accelerate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
    result = run("Accelerate")
    assert result.accelerator.mixed_precision == "bf16"
    twin = run("Mixed precision in bfloat16")
    assert unchanged(weights(result), weights(twin))


def test_accelerate_with_a_grad_scaler(accelerate: Any) -> None:
    """Accelerate has no float16 on the CPU: this is its wrapper with a scaler, as on a GPU."""
    batches = run("The loop").batches
    model, twin = small_model(), small_model()
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    inner = default_sam(model.parameters())
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    for step, (x, y) in enumerate([*batches, batches[0]]):
        before = snapshot(model.parameters())
        for make_step in (optimizer.optimizer.first_step, optimizer.step):
            with FP16():
                loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if step == 48:
                model[0].weight.grad[0, 0] = float("inf")
            make_step()
        optimizer.zero_grad()
        assert not inner.is_perturbed
    assert scaler.get_scale() == 32768 and unchanged(model.parameters(), before)
    assert unchanged(before, train(twin, [[batch] for batch in batches], precision="fp16"))


def test_accelerate_clips_and_resumes(accelerate: Any) -> None:
    batches = run("The loop").batches

    def train_some(steps: slice, save: str = "", load: str = "") -> list[Tensor]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = small_model()
        model, optimizer = accelerator.prepare(model, default_sam(model.parameters()))
        if load:
            accelerator.load_state(load)
        for x, y in batches[steps]:
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.optimizer.first_step()
            accelerator.backward(cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return snapshot(model.parameters())

    expected = train(small_model(), [[batch] for batch in batches], clip=0.5)
    assert unchanged(train_some(slice(None)), expected)
    assert not unchanged(train_some(slice(24), save="state"), expected)
    assert unchanged(train_some(slice(24, None), load="state"), expected)


# -- Hugging Face Trainer --------------------------------------------------------------------------


class Recorded(nn.Module):
    """The recipe's model, and what it was given to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_model()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append((x, labels))
        logits = self.network(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def trainer_run(
    make_optimizer: Callable[..., SAM] = default_sam, **options: Any
) -> SimpleNamespace:
    transformers = pytest.importorskip("transformers")
    page = page_of("Hugging Face Trainer")
    forget_accelerate()  # the page's Trainer
    model = Recorded()
    arguments = transformers.TrainingArguments(
        "trained",
        **{
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            **options,
        },
    )
    optimizer = make_optimizer(model.parameters())
    trainer = page.SAMTrainer(
        model, arguments, train_dataset=page.samples, optimizers=(optimizer, None)
    )
    return SimpleNamespace(model=model, trainer=trainer)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trainer(accelerate: Any, precision: str, accumulate: int, clip: float) -> None:
    result = trainer_run(
        bf16=precision == "bf16",
        per_device_train_batch_size=16 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
    )
    result.trainer.train()
    assert result.trainer.state.global_step == 48
    # Per step the micro-batches of the first pass, then those of the second: the same ones.
    passes = list(batched(result.model.seen, accumulate))
    assert len(passes) == 2 * 48
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        for a, b in zip(first, second, strict=True):
            assert all(map(torch.equal, a, b))

    def linear_schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (48 - step) / 48)

    expected = train(
        small_model(), passes[::2], precision=precision, clip=clip, schedule=linear_schedule
    )
    assert unchanged(weights(result), expected)


def batched(items: list[Any], n: int) -> Iterator[list[Any]]:
    return (items[i : i + n] for i in range(0, len(items), n))


def test_trainer_resumes_with_the_same_bits(accelerate: Any) -> None:
    make = partial(SAM, base_optimizer=torch.optim.AdamW, rho=0.05, lr=0.01)
    whole = trainer_run(make, save_strategy="steps", save_steps=24)
    whole.trainer.train()
    resumed = trainer_run(make)
    resumed.trainer.train(resume_from_checkpoint="trained/checkpoint-24")
    assert len(resumed.model.seen) == 48
    assert unchanged(weights(resumed), weights(whole))
