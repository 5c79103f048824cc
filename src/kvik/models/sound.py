"""Sound out of WAV files: PCM of 8 to 32 bits, any number of channels, any rate, becomes one channel at 16 kHz."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from kvik.errors import StorageError, UsageError
from kvik.models.mel import RATE

_LEAST_RATE, _MOST_RATE = 1_000, 768_000
_MOST_CHANNELS = 64
_ZEROS = 48  # of the sinc on either side: how sharp the filter is
_ROLL = 0.945  # where it begins to fall, as a part of the lower rate's half
_BETA = 9.0  # of its Kaiser window: 90 dB of what must not pass is gone
_GET = "convert it, for example with: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"


def read_wav(path: Path | str) -> Tensor:
    """A file's sound, f32 [samples] between -1 and 1, at 16 kHz.

    Raises:
        StorageError: it can't be read, or is truncated.
        UsageError: it is no WAV file of PCM, or holds no sound.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            if channels > _MOST_CHANNELS or not _LEAST_RATE <= rate <= _MOST_RATE:
                raise UsageError(f"{path}: {channels} channels at {rate:,} Hz; {_GET}")
            promised = count * channels * width
            raw = b"" if promised > size else file.readframes(count)  # nothing is allocated for a header alone
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror or error}); give a WAV file") from None
    except (wave.Error, EOFError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{path}: is no WAV file of PCM samples ({str(error) or 'it ends early'}); {_GET}") from None
    if promised > len(raw):
        raise StorageError(
            f"{path}: its header promises {promised:,} bytes of sound, but the file of {size:,} holds fewer, so it is "
            "truncated; get it again"
        )
    if not raw:
        raise UsageError(f"{path}: holds no sound; give a file that does")
    samples = _samples(raw, width, path)
    return resample(samples.view(-1, channels).mean(1), rate)


def _samples(raw: bytes, width: int, path: Path) -> Tensor:
    """f32 between -1 and 1, from little-endian whole numbers of so many bytes; those of one byte have no sign."""
    if width == 1:
        return (torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.float32)) - 128) / 128
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw, width = padded.tobytes(), 4
    if width not in (2, 4):
        raise UsageError(f"{path}: has samples of {8 * width} bits; {_GET}")
    numbers = np.frombuffer(raw, "<i2" if width == 2 else "<i4").astype(np.float32)
    return torch.from_numpy(numbers) / float(1 << (8 * width - 1))


def resample(sound: Tensor, rate: int, into: int = RATE) -> Tensor:
    """The same sound at another rate: a sinc under a Kaiser window, which lets pass what both rates can hold.

    Output i lies at input i · up / down; `down` outputs in, the same weights come again, `up` inputs further on.

        48 kHz to 16 kHz      up 3, down 1: one set of weights, every third input
        44.1 kHz to 16 kHz    up 441, down 160: 160 sets

    Args:
        sound: f32 [samples] at `rate` a second.

    Returns:
        f32 [ceil(samples · into / rate)].
    """
    if rate == into:
        return sound
    shared = math.gcd(rate, into)
    up, down = rate // shared, into // shared
    width = min(1.0, into / rate) * _ROLL  # of what passes, as a part of the input's half rate
    reach = math.ceil(_ZEROS / width)
    count = -(-len(sound) * down // up)
    padded = pad(sound, (reach, reach + up + 1))[None, None]
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    out = torch.empty(count, dtype=torch.float32)
    for phase in range(min(down, count)):
        first, part = divmod(phase * up, down)
        away = taps - part / down
        inside = (1 - (away / (reach + 1)).square()).clamp(min=0).sqrt()
        weights = torch.sinc(away * width) * torch.special.i0(_BETA * inside)
        found = conv1d(padded[..., first:], (weights / weights.sum()).float()[None, None], stride=up)
        out[phase::down] = found[0, 0, : len(out[phase::down])]
    return out
