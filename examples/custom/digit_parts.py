"""A task of one's own: several yes-or-no answers for each of scikit-learn's digits, judged by F1.

    python examples/custom/digit_parts.py

trains a plain network and writes `teacher.safetensors` beside this file, in some seconds.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

PARTS = [(0, 6, 8, 9), (1, 4, 5, 7), (0, 2, 4, 6, 8), (2, 3, 5, 7)]
"""The digits with a loop, those with a straight line, the even ones and the prime ones."""


def images():
    """Pictures `(n, 1, 8, 8)` and four answers for each, `(n, 4)` of 0 and 1; a part of them becomes the test set."""
    digits = load_digits()
    answers = torch.stack([torch.isin(torch.tensor(digits.target), torch.tensor(part)) for part in PARTS], 1).float()
    pictures = torch.tensor(digits.images[:, None], dtype=torch.float32) / 16 - 0.3
    return {"images": pictures, "labels": answers}


def network():
    """Three convolutions and a linear layer."""
    widths = [(1, 16), (16, 32), (32, 64)]
    blocks = [nn.Sequential(nn.Conv2d(*w, 3, 1, 1), nn.BatchNorm2d(w[1]), nn.ReLU()) for w in widths]
    return nn.Sequential(*blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, len(PARTS)))


class Task:
    """What Paredown needs to know: the first two verbs; the third is better than the default, a squared error."""

    def losses(self, outputs, labels):
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)

    def score(self, answers, labels):
        found, wanted = answers > 0, labels > 0.5
        return float(2 * (found & wanted).sum() / (found.sum() + wanted.sum()).clamp(min=1))

    def mimicry(self, outputs, targets, temperature):
        return F.binary_cross_entropy_with_logits(outputs, targets.sigmoid(), reduction="none").mean(1)


if __name__ == "__main__":
    torch.manual_seed(0), torch.set_num_threads(1)
    model, data = network(), images()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(400):
        some = torch.randint(len(data["images"]) // 2, (64,))
        loss = Task().losses(model(data["images"][some]), data["labels"][some]).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    save_file(model.state_dict(), Path(__file__).with_name("teacher.safetensors"))
