"""Choose the device of a run, and how it computes."""

import torch

from train.shared.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of the configuration; auto is CUDA where torch finds it, else the CPU.

    Raises:
        ConfigError: the configuration asks for CUDA, which is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no CUDA device: allowed here auto, cpu")
    return torch.device(name)


def set_numerics(precision: str = "fp32", threads: int = 0) -> None:
    """Use TF32 in convolutions where the precision is tf32, which is torch's default, and nowhere
    else. Make cuDNN deterministic, or a resumed run would not come out the same.

    Args:
        threads: the number of CPU threads, in whose order sums are taken; 0 leaves it as it is.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
