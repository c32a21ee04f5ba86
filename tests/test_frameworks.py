"""samkernels.integrations in the frameworks themselves, each against the loop written out, bit for
bit: precisions, accumulation, clipping, batches left out, resuming, and what fails in each pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
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

from samkernels import SAM, SAMDirection, SAMMagnitude, frozen_batchnorm_stats
from samkernels.integrations.accelerate import TwoPasses
from samkernels.integrations.lightning import SAMLightningMixin
from samkernels.integrations.transformers import SAMTrainerMixin
from tests.optim_helpers import snapshot, unchanged
from tests.recipes import forget_accelerate, import_quietly, run, weights

pytestmark = [
    # What the frameworks say of themselves, of small data, and of a machine without a GPU.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated"),
    pytest.mark.usefixtures("alone"),
]

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
FP16 = partial(torch.autocast, "cpu", torch.float16)

page_of = functools.cache(run)  # for the classes that a recipe defines
default_sam = partial(SAM, rho=0.05, lr=0.1, momentum=0.9)


Batch = tuple[Tensor, Tensor]


def batched(items: list[Any], n: int) -> list[list[Any]]:
    return [items[i : i + n] for i in range(0, len(items), n)]


def train(
    model: nn.Module,
    steps: list[list[Batch]],
    make_optimizer: Callable[..., SAM] = default_sam,
    *,
    precision: str = "fp32",
    clip: float = 0.0,
    divisor: int | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> list[Tensor]:
    """The weights after a loop as docs/recipes.md has it; a step has one or more micro-batches,
    whose losses are divided by their number or by the divisor."""
    context = {"fp32": nullcontext, "bf16": BF16, "fp16": FP16}[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    optimizer = make_optimizer(model.parameters())
    scheduler = schedule and schedule(optimizer)
    for micro_batches in steps:

        def backward(micro_batches: list[Batch] = micro_batches) -> None:
            for x, y in micro_batches:
                with context():
                    loss = cross_entropy(model(x), y) / (divisor or len(micro_batches))
                scaler.scale(loss).backward()

        backward()
        optimizer.first_step()
        with frozen_batchnorm_stats(model):
            backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return snapshot(model.parameters())


class Trouble:
    """Hands out what it is given, and at one time raises instead: counted from 0."""

    def __init__(self, at: int, error: BaseException | None = None) -> None:
        self.at, self.count, self.error = at, 0, error or KeyboardInterrupt()

    def __call__(self, loss: Any = None) -> Any:
        self.count += 1
        if self.count == self.at + 1:
            raise self.error
        return loss


# -- Lightning -------------------------------------------------------------------------------------

AUTOMATIC = "Lightning"
MANUAL = "Lightning, manual optimization"


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning")


def lightning_run(
    name: str,
    make_optimizer: Callable[..., Any] | None = None,
    *,
    precision: str = "fp32",
    model: Any = None,
    n: int = 48,
    **options: Any,
) -> SimpleNamespace:
    """The module of a recipe and a trainer with other options; and what the loop is to have."""
    import lightning
    from lightning.pytorch.plugins import MixedPrecision

    page = page_of(name)
    torch.manual_seed(1)
    model = (model or page.Classifier)()
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
        loader=DataLoader(page.batches[:n], batch_size=None),
        batches=page.batches[:n],
        steps=[[batch] for batch in page.batches[:n]],
    )


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=48)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lightning_automatic(lightning: Any, precision: str) -> None:
    result = lightning_run(AUTOMATIC, precision=precision)
    result.trainer.fit(result.model, result.loader)
    assert result.trainer.global_step == 48
    expected = train(result.twin, result.steps, precision=precision, schedule=cosine)
    assert unchanged(weights(result), expected)
    assert unchanged(result.model.network.buffers(), list(result.twin.buffers()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lightning_accumulates(lightning: Any, precision: str) -> None:
    """10 batches, four to a step: Lightning divides the last two by 4 as well."""
    result = lightning_run(
        AUTOMATIC, default_sam, precision=precision, n=10, accumulate_grad_batches=4, max_epochs=2
    )
    result.trainer.fit(result.model, result.loader)
    assert result.trainer.global_step == 6
    steps = batched(result.batches, 4) * 2
    expected = train(result.twin, steps, precision=precision, divisor=4)
    assert unchanged(weights(result), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_lightning_leaves_out_batches_without_a_loss(
    lightning: Any, precision: str, accumulate: int
) -> None:
    """training_step returns None: in both passes, and in the second one alone."""
    none, none_in_second = {0, 3, 6, 7}, {10, 11}
    page = page_of(AUTOMATIC)

    class Choosy(page.Classifier):  # type: ignore[name-defined]
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            left_out = none | none_in_second if self.in_second_pass else none
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in left_out else loss

    result = lightning_run(
        AUTOMATIC,
        default_sam,
        precision=precision,
        model=Choosy,
        n=16,
        accumulate_grad_batches=accumulate,
    )
    result.trainer.fit(result.model, result.loader)
    kept = [
        [i for i in step if i not in none | none_in_second]
        for step in batched([*range(16)], accumulate)
    ]
    steps = [[result.batches[i] for i in step] for step in kept if step]
    expected = train(result.twin, steps, precision=precision, divisor=accumulate)
    assert unchanged(weights(result), expected)


@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize("takes_index", [True, False])
def test_lightning_training_steps_of_all_kinds(
    lightning: Any, returns: str, takes_index: bool
) -> None:
    page = page_of(AUTOMATIC)

    class Other(page.Classifier):  # type: ignore[name-defined]
        def compute(self, batch: Batch) -> Any:
            loss = cross_entropy(self.network(batch[0]), batch[1])
            return loss if returns == "tensor" else {"loss": loss, "more": 1}

        if takes_index:

            def training_step(self, batch: Batch, index: int) -> Any:
                return self.compute(batch)

        else:

            def training_step(self, batch: Batch) -> Any:
                return self.compute(batch)

    result = lightning_run(AUTOMATIC, default_sam, model=Other, n=4)
    result.trainer.fit(result.model, result.loader)
    assert unchanged(weights(result), train(result.twin, result.steps))


def test_lightning_logs_the_first_pass(lightning: Any) -> None:
    page = page_of(AUTOMATIC)
    logged: list[Tensor] = []

    class Logs(page.Classifier):  # type: ignore[name-defined]
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = cross_entropy(self.network(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=1)
            self.log_dict({"also": loss}, on_step=False, on_epoch=True, batch_size=1)
            if not self.in_second_pass:
                logged.append(loss.detach())
            return loss

    result = lightning_run(AUTOMATIC, model=Logs, n=6)
    result.trainer.fit(result.model, result.loader)
    assert len(logged) == 6
    for name in ("loss", "also"):
        torch.testing.assert_close(
            result.trainer.logged_metrics[name], torch.stack(logged).mean(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("place", ["first pass", "second pass", "hook", "clipping"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_lightning_saves_w_when_something_fails(
    lightning: Any, precision: str, place: str, accumulate: int
) -> None:
    page = page_of(AUTOMATIC)
    trouble = Trouble(4, RuntimeError("the disk is full"))

    class Fails(page.Classifier):  # type: ignore[name-defined]
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if place == ("second pass" if self.in_second_pass else "first pass"):
                trouble()
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if place == "hook":
                trouble()

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            if place == "clipping":
                trouble()

    class Saves(lightning.Callback):  # type: ignore[name-defined]
        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint("saved.ckpt")

    result = lightning_run(
        AUTOMATIC,
        default_sam,
        precision=precision,
        model=Fails,
        n=18,
        accumulate_grad_batches=accumulate,
        callbacks=[Saves()],
    )
    with pytest.raises(RuntimeError, match="the disk is full"):
        result.trainer.fit(result.model, result.loader)
    done = 4 // accumulate if "pass" in place else 4  # the passes count micro-batches
    steps = batched(result.batches, accumulate)[:done]
    expected = train(result.twin, steps, precision=precision)
    saved = torch.load("saved.ckpt", weights_only=True)
    assert unchanged([saved["state_dict"][n] for n, _ in result.model.named_parameters()], expected)
    assert saved["optimizer_states"][0]["state"].keys() == ({*range(6)} if done else set())
    # What was left behind does no harm to the next run.
    trouble.at = 10_000
    again = lightning_run(AUTOMATIC, default_sam, precision=precision, model=lambda: result.model)
    again.trainer.fit(again.model, again.loader)
    assert unchanged(weights(again), train(again.twin, again.steps, precision=precision))


def test_lightning_clips_the_second_gradient(lightning: Any) -> None:
    result = lightning_run(AUTOMATIC, gradient_clip_val=0.5)
    result.trainer.fit(result.model, result.loader)
    start = copy.deepcopy(result.twin)
    expected = train(result.twin, result.steps, clip=0.5, schedule=cosine)
    assert unchanged(weights(result), expected)
    assert not unchanged(expected, train(start, result.steps, schedule=cosine))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lightning_manual(lightning: Any, precision: str) -> None:
    result = lightning_run(MANUAL, precision=precision)
    result.trainer.fit(result.model, result.loader)
    assert result.trainer.global_step == 48
    expected = train(result.twin, result.steps, precision=precision)
    assert unchanged(weights(result), expected)
    assert unchanged(result.model.network.buffers(), list(result.twin.buffers()))


@pytest.mark.parametrize(
    ("name", "precision"),
    [(AUTOMATIC, "fp32"), (AUTOMATIC, "bf16"), (AUTOMATIC, "fp16"), (MANUAL, "fp16")],
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


class WithoutMixin:
    """A LightningModule that knows nothing of SAM."""

    def __new__(cls) -> Any:
        import lightning

        class Plain(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = small_model()

            def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
                return cross_entropy(self.network(batch[0]), batch[1])

        return Plain()


def test_lightning_without_the_mixin(lightning: Any) -> None:
    """It passes a closure to step(); with a GradScaler it does not, and step() says what to do."""
    result = lightning_run(AUTOMATIC, default_sam, model=WithoutMixin)
    result.trainer.fit(result.model, result.loader)
    assert unchanged(weights(result), train(result.twin, result.steps))
    result = lightning_run(AUTOMATIC, default_sam, model=WithoutMixin, precision="fp16")
    with pytest.raises(RuntimeError, match=r'SAM\.step\(\) needs two gradients.*"Lightning"'):
        result.trainer.fit(result.model, result.loader)
    assert unchanged(weights(result), snapshot(result.twin.parameters()))


def test_lightning_mixin_says_what_is_missing(lightning: Any) -> None:
    page = page_of(AUTOMATIC)

    class Forgets(page.Classifier):  # type: ignore[name-defined]
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            pass

    result = lightning_run(AUTOMATIC, model=Forgets)
    with pytest.raises(RuntimeError, match=r"call super\(\).on_train_batch_start"):
        result.trainer.fit(result.model, result.loader)
    result = lightning_run(AUTOMATIC, partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(TypeError, match="the optimizer is SGD: give a SAM"):
        result.trainer.fit(result.model, result.loader)
    assert issubclass(page.Classifier, SAMLightningMixin)


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def accelerate(fresh_accelerate: None) -> Any:
    return pytest.importorskip("accelerate")


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def accelerated(
    accelerate: Any, model: nn.Module, *, accumulate: int = 1, precision: str = "fp32"
) -> tuple[TwoPasses, Callable[..., Tensor]]:
    """The two passes of a model, and what computes its loss."""
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        mixed_precision="bf16" if precision == "bf16" else "no",
    )
    if precision == "fp16":  # Accelerate has none on the CPU
        accelerator.scaler = torch.amp.GradScaler("cpu")
    model, optimizer = accelerator.prepare(model, default_sam(model.parameters()))
    passes = TwoPasses(accelerator, model, optimizer)

    def compute_loss(x: Tensor, y: Tensor) -> Tensor:
        with FP16() if precision == "fp16" else accelerator.autocast():
            return cross_entropy(model(x), y)

    return passes, compute_loss


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accelerate(accelerate: Any, precision: str, accumulate: int) -> None:
    batches = run("The loop").batches
    model, twin = small_model(), small_model()
    passes, compute_loss = accelerated(
        accelerate, model, accumulate=accumulate, precision=precision
    )
    losses = [passes.step(compute_loss, x, y) for x, y in batches]
    expected = train(twin, batched(batches, accumulate), precision=precision)
    assert unchanged(model.parameters(), expected)
    assert not any(loss.requires_grad for loss in losses) and losses[-1] < losses[0]


def test_accelerate_at_the_end_of_the_data(accelerate: Any) -> None:
    """Ten batches, four to a step: Accelerate divides the last two by 4, and steps with them."""
    batches = run("The loop").batches[:10]
    model, twin = small_model(), small_model()
    passes, compute_loss = accelerated(accelerate, model, accumulate=4)
    loader = passes.accelerator.prepare(DataLoader(batches, batch_size=None))
    for _ in range(2):
        for x, y in loader:
            passes.step(compute_loss, x, y)
    assert unchanged(model.parameters(), train(twin, batched(batches, 4) * 2, divisor=4))


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_accelerate_is_interrupted_and_goes_on(
    accelerate: Any, error: BaseException, call: int
) -> None:
    """In the third step, in each pass of its two micro-batches: what was accumulated is dropped."""
    batches = run("The loop").batches[:10]
    model, twin = small_model(), small_model()
    passes, compute_loss = accelerated(accelerate, model, accumulate=2)
    trouble = Trouble(8 + call, error)
    done = copy.deepcopy(twin)
    expected = train(done, batched(batches[:4], 2))
    kept = [*batches[:4], *batches[6:]]  # without the third step
    if call == 0:  # its first micro-batch: the second one is a step of its own
        kept = [*batches[:4], batches[5], *batches[6:]]
    for x, y in batches:
        try:
            passes.step(lambda x, y: trouble(compute_loss(x, y)), x, y)
        except type(error):
            assert unchanged(model.parameters(), expected)
            assert all(p.grad is None for p in model.parameters())
            passes.optimizer.state_dict()  # refused between the steps
    steps = batched(kept, 2) if call else [kept[:2], kept[2:4], [kept[4]], kept[5:7], kept[7:]]
    assert unchanged(model.parameters(), train(twin, steps, divisor=2))


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
        model, optimizer = accelerator.prepare(
            model, default_sam(model.parameters(), max_grad_norm=0.5)
        )
        if load:
            accelerator.load_state(load)
        passes = TwoPasses(accelerator, model, optimizer)
        for x, y in batches[steps]:
            passes.step(lambda x, y: cross_entropy(model(x), y), x, y)
        if save:
            accelerator.save_state(save)
        return snapshot(model.parameters())

    clipped = partial(default_sam, max_grad_norm=0.5)
    expected = train(small_model(), [[batch] for batch in batches], clipped)
    assert unchanged(train_some(slice(None)), expected)
    assert not unchanged(train_some(slice(24), save="state"), expected)
    assert unchanged(train_some(slice(24, None), load="state"), expected)


def test_accelerate_refuses_other_optimizers(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="the optimizer is AcceleratedOptimizer: give a SAM"):
        TwoPasses(accelerator, model, optimizer)


# -- Hugging Face Trainer --------------------------------------------------------------------------


class Recorded(nn.Module):
    """The recipe's model, and what it was given to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_model()
        self.seen: list[Batch] = []
        self.trouble: Callable[[Tensor], Tensor] = lambda loss: loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append((x, labels))
        logits = self.network(x)
        return {"loss": self.trouble(cross_entropy(logits, labels)), "logits": logits}


def trainer_run(
    make_optimizer: Callable[..., Any] | None = default_sam,
    *,
    cls_and_kwargs: Any = None,
    n: int = 768,
    **options: Any,
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
    optimizer = make_optimizer(model.parameters()) if make_optimizer else None
    trainer = page.SAMTrainer(
        model,
        arguments,
        train_dataset=page.samples[:n],
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=cls_and_kwargs,
    )
    return SimpleNamespace(model=model, trainer=trainer)


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int = 48) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)


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
    passes = batched(result.model.seen, accumulate)
    assert len(passes) == 2 * 48
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        for a, b in zip(first, second, strict=True):
            assert all(map(torch.equal, a, b))
    expected = train(
        small_model(), passes[::2], precision=precision, clip=clip, schedule=linear_schedule
    )
    assert unchanged(weights(result), expected)


def test_trainer_at_the_end_of_the_data(accelerate: Any) -> None:
    """Ten batches, four to a step."""
    result = trainer_run(
        n=160, gradient_accumulation_steps=4, max_grad_norm=0.0, num_train_epochs=2
    )
    result.trainer.train()
    seen = iter(result.model.seen)
    steps = []
    for size in (4, 4, 2) * 2:
        steps.append([next(seen) for _ in range(size)])
        assert all(torch.equal(x, next(seen)[0]) for x, _ in steps[-1])
    assert next(seen, None) is None
    expected = train(small_model(), steps, schedule=partial(linear_schedule, steps=6))
    assert unchanged(weights(result), expected)


def test_trainer_resumes_with_the_same_bits(accelerate: Any) -> None:
    make = partial(SAM, base_optimizer=torch.optim.AdamW, rho=0.05, lr=0.01)
    whole = trainer_run(make, save_strategy="steps", save_steps=24)
    whole.trainer.train()
    resumed = trainer_run(make)
    resumed.trainer.train(resume_from_checkpoint="trained/checkpoint-24")
    assert len(resumed.model.seen) == 48
    assert unchanged(weights(resumed), weights(whole))


def test_trainer_makes_the_optimizer(accelerate: Any) -> None:
    options = {"base_optimizer": torch.optim.SGD, "rho": 0.05, "lr": 0.1, "momentum": 0.9}
    result = trainer_run(None, cls_and_kwargs=(SAM, options), weight_decay=0.1)
    result.trainer.train()
    sam = result.trainer.optimizer.optimizer
    assert type(sam) is SAM
    assert [(g["weight_decay"], len(g["params"])) for g in sam.param_groups] == [(0.1, 2), (0, 2)]


@pytest.mark.parametrize("call", [*range(4), "clipping"])
def test_trainer_saves_w_when_something_fails(accelerate: Any, call: int | str) -> None:
    """In the third step, in each pass of its two micro-batches, and between passes and step."""
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if call == "clipping" and state.global_step == 2:
                raise KeyboardInterrupt

    result = trainer_run(gradient_accumulation_steps=2)
    result.trainer.add_callback(Stops())
    if isinstance(call, int):
        result.model.trouble = Trouble(8 + call)
    with pytest.raises(KeyboardInterrupt):
        result.trainer.train()
    steps = [result.model.seen[:2], result.model.seen[4:6]]
    expected = train(small_model(), steps, clip=1.0, schedule=partial(linear_schedule, steps=24))
    assert unchanged(weights(result), expected)
    result.trainer.save_model("saved")
    from safetensors.torch import load_file

    saved = load_file("saved/model.safetensors")
    assert unchanged([saved[n] for n, _ in result.model.named_parameters()], expected)
    result.trainer.optimizer.state_dict()  # refused between the steps


@pytest.mark.parametrize("call", range(4))
def test_trainer_finds_a_batch_size(accelerate: Any, call: int) -> None:
    """Out of memory in each pass of the third step's micro-batches: with a smaller batch, the
    Trainer begins anew, from the weights that there are."""
    result = trainer_run(
        gradient_accumulation_steps=2, auto_find_batch_size=True, max_grad_norm=0.0
    )
    result.model.trouble = Trouble(8 + call, RuntimeError("CUDA out of memory."))
    result.trainer.train()
    seen = result.model.seen
    new = iter(seen[9 + call :])
    steps_anew: list[list[Batch]] = []
    for micro_batches in batched([*range(55)], 2):  # of 14
        steps_anew.append([next(new) for _ in micro_batches])
        assert all(torch.equal(x, next(new)[0]) for x, _ in steps_anew[-1])
    assert next(new, None) is None and len(steps_anew[0][0][0]) == 14
    model = small_model()
    optimizer = default_sam(model.parameters())
    for steps, total in (([seen[:2], seen[4:6]], 24), (steps_anew, len(steps_anew))):
        optimizer.param_groups[0].pop("initial_lr", None)
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, steps, lambda _: optimizer, schedule=partial(linear_schedule, steps=total))
    assert unchanged(weights(result), snapshot(model.parameters()))


def test_trainer_refuses_other_optimizers(accelerate: Any) -> None:
    result = trainer_run(partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(TypeError, match="the optimizer is AcceleratedOptimizer: give a SAM"):
        result.trainer.train()


def test_trainer_without_the_mixin_says_what_to_do(accelerate: Any) -> None:
    transformers = pytest.importorskip("transformers")
    result = trainer_run()
    assert isinstance(result.trainer, SAMTrainerMixin)
    plain = transformers.Trainer(
        result.model,
        result.trainer.args,
        train_dataset=result.trainer.train_dataset,
        optimizers=(result.trainer.optimizer, None),
    )
    with pytest.raises(RuntimeError, match=r'needs two gradients.*"Hugging Face Trainer"'):
        plain.train()


# -- fastai ----------------------------------------------------------------------------------------


@pytest.fixture
def fastai() -> Any:
    return import_quietly("fastai")


def learner(
    cls: type[SAM] = SAM,
    *callbacks: Any,
    model: nn.Module | None = None,
    loss_fn: Callable[..., Tensor] = cross_entropy,
    **options: Any,
) -> Any:
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    from samkernels.integrations.fastai import SAMCallback

    loader = DataLoader(page_of("The loop").batches, batch_size=None)
    options = {"base_optimizer": torch.optim.SGD, "rho": 0.05, "momentum": 0.9, **options}
    result = Learner(
        DataLoaders(loader, loader),
        model or small_model(),
        loss_func=loss_fn,
        opt_func=partial(OptimWrapper, opt=cls, **options),
        cbs=[SAMCallback(), *callbacks],
        lr=0.1,
        path=Path(),
    )
    result.remove_cb(ProgressCallback)
    result.logger = lambda *_: None
    return result


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_fastai(
    fastai: Any, monkeypatch: pytest.MonkeyPatch, clip: float, precision: str, accumulate: int
) -> None:
    from fastai.callback import fp16
    from fastai.callback.training import GradientAccumulation, GradientClip

    callbacks: list[Any] = []
    if accumulate > 1:
        callbacks.append(GradientAccumulation(16 * accumulate))
    if clip:
        callbacks.append(GradientClip(clip))
    if precision == "fp16":  # on the CPU
        monkeypatch.setattr(fp16, "autocast", lambda _, dtype: FP16())
        scaler = partial(torch.amp.GradScaler, "cpu")
        monkeypatch.setattr(fp16, "GradScaler", lambda _, **options: scaler(**options))
        callbacks.append(fp16.MixedPrecision())
    result = learner(SAM, *callbacks)
    result.fit(1)
    steps = batched(page_of("The loop").batches, accumulate)
    expected = train(small_model(), steps, clip=clip, precision=precision)
    for p, q in zip(result.model.parameters(), expected, strict=True):
        # Accumulating, fastai divides by n_acc / 16 and multiplies; unscaled once more, with fp16.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert len(result.recorder.losses) == 48
    assert result.recorder.losses[-1] < result.recorder.losses[0]


@pytest.mark.parametrize("place", ["first pass", "second pass", "clipping"])
def test_fastai_saves_w_when_something_fails(fastai: Any, place: str) -> None:
    from fastai.callback.core import Callback

    class Clips(Callback):
        order = 11

        def before_step(self) -> None:
            if place == "clipping":
                trouble()

    at = {"first pass": 8, "second pass": 9, "clipping": 4}[place]
    trouble = Trouble(at)
    result = learner(
        SAM, Clips(), loss_fn=lambda *a: (trouble if "pass" in place else float_)(cross_entropy(*a))
    )
    with pytest.raises(KeyboardInterrupt):
        result.fit(1)
    batches = page_of("The loop").batches
    expected = train(small_model(), [[batch] for batch in batches[:4]])
    assert unchanged(result.model.parameters(), expected)
    result.save("saved")
    # What was left behind does no harm: a new fit() goes on from w, with the momentum there was.
    trouble.at = 10_000
    result.opt.zero_grad()
    result.fit(1)
    expected = train(small_model(), [[batch] for batch in [*batches[:4], *batches]])
    assert unchanged(result.model.parameters(), expected)


def float_(loss: Tensor) -> Tensor:
    return loss


def test_fastai_resumes_with_the_same_bits(fastai: Any) -> None:
    whole, first, second = (learner() for _ in range(3))
    whole.fit(2)
    first.fit(1)
    first.save("half")
    second.create_opt()
    second.load("half")
    second.fit(1)
    assert not unchanged(first.model.parameters(), snapshot(whole.model.parameters()))
    assert unchanged(second.model.parameters(), snapshot(whole.model.parameters()))


def test_fastai_schedules_and_overflows(fastai: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastai.callback import fp16, schedule  # noqa: F401

    monkeypatch.setattr(fp16, "autocast", lambda _, dtype: FP16())
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0**40)
    monkeypatch.setattr(fp16, "GradScaler", lambda _, **options: scaler(**options))
    result = learner(SAM, fp16.MixedPrecision())
    result.fit_one_cycle(1, lr_max=0.1)
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert result.recorder.losses[-1] < 1.2
    (hypers,) = result.opt.hypers
    assert hypers["lr"] < 1e-3 and hypers["mom"] == pytest.approx(0.95, abs=1e-3)
    for refused in (
        learner(SAMDirection, fp16.MixedPrecision()),
        learner(SAM, fp16.MixedPrecision(), track_statistics=True),
    ):
        with pytest.raises(ValueError, match="unscales the second gradient only"):
            refused.fit(1)
    learner(SAMMagnitude, fp16.MixedPrecision()).fit(1)


def test_fastai_refuses_other_optimizers(fastai: Any) -> None:
    from fastai.optimizer import SGD

    result = learner()
    result.opt_func = SGD
    with pytest.raises(TypeError, match="the optimizer is Optimizer: give a SAM"):
        result.fit(1)


# -- Ignite ----------------------------------------------------------------------------------------


def test_ignite_says_what_to_do() -> None:
    engine = pytest.importorskip("ignite.engine")
    model = small_model()
    trainer = engine.create_supervised_trainer(
        model, default_sam(model.parameters()), cross_entropy
    )
    with pytest.raises(RuntimeError, match=r'needs two gradients.*"Ignite"'):
        trainer.run(page_of("The loop").batches)
