"""Channel attention of the teacher's encoder (paper, section 2.2, equations 1-4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REDUCTION = 16
SMALLEST_HIDDEN = 4  # keeps the bottleneck of narrow networks (width 16: 16/16 = 1) from closing


class ChannelAttention(nn.Module):
    """Weighs the channels of a feature map by its global average and maximum.

    ``U = sigmoid(FC2(ReLU(FC1(avg F))) + FC2(ReLU(FC1(max F))))``, ``F' = U * F``; both pools share FC1 and FC2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(SMALLEST_HIDDEN, channels // REDUCTION)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Weigh ``features`` [B,C,H,W]; same shape and dtype out."""
        average = self.fc2(torch.relu(self.fc1(features.mean(dim=(2, 3)))))
        maximum = self.fc2(torch.relu(self.fc1(features.amax(dim=(2, 3)))))
        weights = torch.sigmoid(average + maximum)
        return features * weights[:, :, None, None]
