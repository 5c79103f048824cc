"""Pictures to learn from: scikit-learn's handwritten digits, still or in other places of a larger picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.errors import UsageError

CLASSES = 10
SIDE, FIELD = 8, 16  # pixels of a digit, and of the picture that it moves over
NEAR, FAR = (
    4,
    8,
)  # places, in pixels from the upper left: learnt ones are 0 … NEAR in both directions, shifted ones beyond
_SPLIT = 0  # the seed that says which digits are held out: the same for every training
_HELD = 360  # of 1,797


@dataclass(frozen=True)
class Pictures:
    """Pictures f32 [n, 1, side, side] from 0 to 1 and their digits int64 [n].

    Attributes:
        learnt, held: to learn from, and never learnt from.
        shifted: held digits in places where none was learnt; None where digits don't move.
    """

    learnt: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    shifted: tuple[Tensor, Tensor] | None = None

    @property
    def side(self) -> int:
        """Pixels."""
        return self.learnt[0].shape[-1]


def digits() -> Pictures:
    """8 x 8 pixels each. Raises UsageError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed; pip install -c constraints.txt -e '.[train]'"
        ) from None
    found = load_digits()
    pictures, labels = torch.tensor(found.images).float().unsqueeze(1) / 16, torch.tensor(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT))
    held, learnt = order[:_HELD], order[_HELD:]
    return Pictures((pictures[learnt], labels[learnt]), (pictures[held], labels[held]))


def moving(seed: int = 0) -> Pictures:
    """Each digit somewhere in 16 x 16 pixels: in the upper left when learnt, further right and down when `shifted`."""
    still, generator = digits(), torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(torch.arange(NEAR + 1), torch.arange(NEAR + 1))
    learnt = torch.cat([placed(still.learnt[0], places[_drawn(len(still.learnt[0]), len(places), generator)])
                        for _ in range(4)])  # fmt: skip
    held = placed(still.held[0], places[_drawn(_HELD, len(places), generator)])
    beyond = torch.cartesian_prod(torch.arange(NEAR + 1, FAR + 1), torch.arange(NEAR + 1, FAR + 1))
    shifted = placed(still.held[0], beyond[_drawn(_HELD, len(beyond), generator)])
    labels = still.held[1]
    return Pictures((learnt, still.learnt[1].repeat(4)), (held, labels), (shifted, labels))


def placed(pictures: Tensor, places: Tensor) -> Tensor:
    """Digits [n, 1, 8, 8] at places int64 [n, 2] of empty pictures [n, 1, 16, 16]."""
    field = pictures.new_zeros((len(pictures), 1, FIELD, FIELD))
    rows, columns = (places[:, axis, None] + torch.arange(SIDE) for axis in (0, 1))
    field[torch.arange(len(pictures))[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = pictures[:, 0]
    return field


def _drawn(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randint(most, (count,), generator=generator)
