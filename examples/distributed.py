"""Train with SAM in several processes, by DistributedDataParallel.

torchrun --nproc-per-node=2 examples/distributed.py --perturbation=local

On two nodes of four GPUs each, start this on both; HOST is the name of one of them:

torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
    --rdzv-id=1 examples/distributed.py

With "global" the perturbation follows the gradient of the whole batch, with "local" each process
perturbs by its own (m-sharpness), which sends less. Needs scikit-learn.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from samkernels import SAM

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--perturbation", choices=["global", "local"], default="global")
args = parser.parse_args()

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
train, test = torch.utils.data.random_split(digits, [1200, len(digits) - 1200])
sampler = DistributedSampler(train)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
model = DistributedDataParallel(model)
optimizer = SAM(model.parameters(), rho=0.05, perturbation=args.perturbation, lr=0.1, momentum=0.9)

for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    for x, y in DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler):
        x, y = x.to(device), y.to(device)
        with optimizer.first_pass(model):  # does not average the gradients if each has its own
            nn.functional.cross_entropy(model(x), y).backward()
        with optimizer.perturbed():
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
    if dist.get_rank() == 0:
        x, y = (t.to(device) for t in test[:])
        accuracy = (model.module(x).argmax(dim=1) == y).float().mean().item()
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}", flush=True)
dist.destroy_process_group()
