"""Fine-tune a small transformer with LoRA, AdamW and BAR, which balances LoRA's factors.

python examples/lora.py --epochs=10

The network learns the digits 0 to 4, row by row; fine-tuning then adds 5 to 9 with the old weights
frozen. BAR makes one pass per step. Needs scikit-learn.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from samkernels import BAR

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()


class LoRA(nn.Module):
    """Adds lora_B @ lora_A to a weight."""

    def __init__(self, weight: Tensor, rank: int = 4) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


def train(optimizer: torch.optim.Optimizer, rows: Tensor, epochs: int) -> None:
    for _ in range(epochs):
        for batch in rows[torch.randperm(len(rows))].split(64):
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32).div(16).view(-1, 8, 8)  # 8 tokens of 8 pixels
y = torch.tensor(labels)
rows, test = torch.arange(1200), torch.arange(1200, len(x))
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
model = nn.Sequential(
    *(nn.Linear(8, 32), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(8 * 32, 10))
)
train(torch.optim.AdamW(model.parameters(), lr=1e-3), rows[y[rows] < 5], args.epochs)
model.requires_grad_(False)
for module in [m for m in model.modules() if type(m) is nn.Linear]:
    register_parametrization(module, "weight", LoRA(module.weight))
factors = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
train(BAR(factors, torch.optim.AdamW, alpha=0.05, lr=3e-3), rows, args.epochs)
correct = (model(x[test]).argmax(dim=1) == y[test]).float()
print(f"test accuracy {correct.mean():.3f}, of 5 to 9 {correct[y[test] > 4].mean():.3f}")
