"""Check the first steps of a run in lockstep, without the run: `python -m train.verify`."""

import sys
from collections.abc import Sequence

from train.inputs.data import train_batches
from train.loop.run import Training
from train.settings.config import from_command_line
from train.settings.registry import MODELS, OPTIMIZERS
from train.shared.errors import ConfigError, guarded

USAGE = """\
python -m train.verify [--verify_steps=N] [--KEY=VALUE ...]

Takes the first N steps (20) of the run that `python -m train` would train with these flags, in
lockstep with the reference backend, and says the largest deviation. Nothing is evaluated or kept.
"""


def main(arguments: Sequence[str]) -> int:
    """Take the steps, print the deviation, and return the exit code of the process."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    config = from_command_line(arguments)
    if not config.verify_steps or OPTIMIZERS[config.opt_name].step == "plain":
        raise ConfigError(
            f"verify_steps={config.verify_steps} with opt_name={config.opt_name} compares nothing: "
            "allowed 1 or more, and an optimizer of this package"
        )
    training, epoch = Training(config), 0
    training.model.train()
    while training.lockstep is not None:
        epoch += 1
        for images, labels in train_batches(
            training.dataset, config.batch_size, config.seed, epoch
        ):
            training.take_step(images, labels, len(labels), False, [])
            training.done += 1
            if training.lockstep is None:
                break
    found = training.verification or {}
    model = MODELS[config.model].title if config.model in MODELS else config.model
    print(
        f"{model}, {config.run_name}: {found['steps']} steps of {config.batch_size} images by "
        f"{', '.join(training.optimizer.backends.values())}, largest relative deviation "
        f"{found['value']:.1e} (allowed {found['tolerance']:.0e})"
        + (f" in '{found['parameter']}', step {found['step']}" if found["value"] else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
