"""Images to train on."""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Images (N, 3, 32, 32) in fp32, normalised, and their classes (N) as int64."""

    images: Tensor
    labels: Tensor


HELD_OUT = 360


def digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits (they come with it), resized from 8×8 to 3×32×32: 1,437 to train on, 360 held out.

    The split is the same every time; the normalisation is that of the training part.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Split(images[train], labels[train]), Split(images[held_out], labels[held_out])
