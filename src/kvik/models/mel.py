"""What models hear: the logarithm of sound's power in bands as wide as the ear's, 100 frames a second.

    frame     400 samples (25 ms) under a Hann window, every 160 (10 ms), at 16 kHz
    bands     triangles over the power spectrum, evenly spaced on Slaney's mel scale from 0 to 8 kHz: linear up to
              1 kHz (200/3 Hz a mel), logarithmic above (a factor of 6.4 in 27 mels); each of area 1
    scale     (max(log₁₀ power, loudest - 8) + 4) / 4

As Whisper was trained (arXiv:2212.04356, §2.2).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

RATE = 16_000  # samples a second
HOP = 160
_WIDTH = 400
_SILENCE = 1e-10
_DEPTH = 8.0  # decades below the loudest that count
_LINEAR_HZ = 200 / 3  # a mel, below _BEND
_BEND = 1000.0
_LOG_STEP = math.log(6.4) / 27


def mel_filters(count: int) -> Tensor:
    """f64 [count, 201]: what each band takes of each frequency of the power spectrum."""
    highest = _BEND / _LINEAR_HZ + math.log(RATE / 2 / _BEND) / _LOG_STEP
    mels = torch.linspace(0, highest, count + 2, dtype=torch.float64)
    above = _BEND * torch.exp(_LOG_STEP * (mels - _BEND / _LINEAR_HZ))
    edges = torch.where(mels < _BEND / _LINEAR_HZ, mels * _LINEAR_HZ, above)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = torch.linspace(0, RATE / 2, _WIDTH // 2 + 1, dtype=torch.float64)
    slopes = torch.minimum((hz - low) / (middle - low), (high - hz) / (high - middle)).clamp(min=0)
    return slopes * 2 / (high - low)


@lru_cache(maxsize=4)
def _filters(count: int) -> Tensor:
    return mel_filters(count)


def log_mel(sound: Tensor, mels: int, frames: int) -> Tensor:
    """Features of one window of sound; silence follows it to its end.

    Args:
        sound: f32 [samples] at 16 kHz, at most 160 · frames of them.
        mels: bands.
        frames: of the window.

    Returns:
        f32 [frames, mels].
    """
    assert len(sound) <= frames * HOP, f"{len(sound)} samples are more than {frames} frames hold"
    window = torch.zeros(frames * HOP, dtype=torch.float64)
    window[: len(sound)] = sound
    hann = torch.hann_window(_WIDTH, dtype=torch.float64)
    spectrum = torch.stft(window, _WIDTH, HOP, window=hann, return_complex=True)[:, :-1]
    power = _filters(mels) @ spectrum.abs().square()
    levels = power.clamp(min=_SILENCE).log10()
    return ((levels.clamp(min=float(levels.max()) - _DEPTH) + 4) / 4).t().float().contiguous()
