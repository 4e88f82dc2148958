"""The net of the PEFT cases, and how far two tensors are apart."""

import torch
from torch import nn


class Net(nn.Module):
    """linear1 -> relu -> linear2 -> ... , with the sizes of the weights in `base`: {"linear1.weight": ..., ...}."""

    def __init__(self, base):
        super().__init__()
        self.names = [f"linear{i}" for i in range(1, 1 + sum(name.endswith(".weight") for name in base))]
        for name in self.names:
            outputs, inputs = base[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(inputs, outputs, bias=f"{name}.bias" in base))
        self.load_state_dict(base)

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x if name == "linear1" else torch.relu(x))
        return x


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
