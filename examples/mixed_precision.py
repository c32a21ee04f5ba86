"""Train a small network with SAM in mixed precision, on one GPU or on a CPU.

python examples/mixed_precision.py --epochs=10

The GPU takes float16 with a GradScaler, the CPU bfloat16 without one. Needs scikit-learn.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from samkernels import SAM, frozen_batchnorm_stats

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--rho", type=float, default=0.05)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16
pixels, labels = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32, device=device).div(16).view(-1, 1, 8, 8)
y = torch.tensor(labels, device=device)
order = torch.randperm(len(x), device=device)
train, test = order[:1200], order[1200:]

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
).to(device)
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=args.rho, lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)


def backward(batch: torch.Tensor) -> None:
    with torch.autocast(device, dtype):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    scaler.scale(loss).backward()


for epoch in range(args.epochs):
    model.train()
    for batch in train[torch.randperm(len(train), device=device)].split(64):
        backward(batch)
        with optimizer.perturbed():  # moves the weights to w + e(w)
            with frozen_batchnorm_stats(model):  # running statistics belong to w
                backward(batch)
            scaler.step(optimizer)  # restores w, and updates it
        scaler.update()
        optimizer.zero_grad()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(dim=1) == y[test]).float().mean().item()
    print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}")
