"""Compare variants of SAM on scikit-learn's digits, of whose training labels 20% are wrong.

python examples/choose_variant.py --epochs=10 --seeds=3

Put your own data and network here, and search rho for each variant by itself. Needs scikit-learn.
"""

import argparse
from contextlib import nullcontext
from time import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from samkernels import GSAM, MSAM, SAM, LookSAM, Periodic

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seeds", type=int, default=3)
args = parser.parse_args()

x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
variants = {
    "SGD": lambda params: torch.optim.SGD(params, **sgd),
    "SAM": lambda params: SAM(params, rho=0.2, **sgd),
    "SAM, every 10th step": lambda params: SAM(params, rho=1.0, when=Periodic(10), **sgd),
    "SAM, adaptive": lambda params: SAM(params, rho=1.0, adaptive=True, **sgd),
    "GSAM": lambda params: GSAM(params, rho=0.2, alpha=0.1, **sgd),
    "LookSAM": lambda params: LookSAM(params, rho=0.2, k=5, alpha=0.1, **sgd),
    "MSAM": lambda params: MSAM(params, rho=1.0, **sgd),
}


def accuracy_of(make, seed):
    torch.manual_seed(seed)
    train, test = torch.randperm(len(x)).split([1000, len(x) - 1000])
    noisy = torch.where(torch.rand(len(y)) < 0.2, torch.randint(10, y.shape), y)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = make(model.parameters())
    for batch in (b for _ in range(args.epochs) for b in train[torch.randperm(1000)].split(50)):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), noisy[batch])
            loss.backward()
            return loss

        optimizer.step(closure)  # calls it once or twice, as the variant needs
    with getattr(optimizer, "unperturbed", nullcontext)():  # MSAM's weights are perturbed ones
        return (model(x[test]).argmax(dim=1) == y[test]).float().mean()


print(f"{'':22} accuracy  deviation  seconds")
for name, make in variants.items():
    start = time()
    found = torch.stack([accuracy_of(make, seed) for seed in range(args.seeds)])
    print(f"{name:22} {found.mean():8.3f} {found.std(correction=0):10.3f} {time() - start:8.1f}")
