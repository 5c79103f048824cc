"""Sound: features against transformers', resampling against the sines that it must keep, WAV files whole and broken."""

import math
import struct
import wave

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from kvik.errors import StorageError, UsageError
from kvik.models.mel import HOP, RATE, log_mel, mel_filters
from kvik.models.sound import read_wav, resample


def sine(hz, rate, seconds=1.0):
    return torch.sin(2 * math.pi * hz * torch.arange(round(rate * seconds), dtype=torch.float64) / rate)


def speechlike(seconds, seed=0):
    """Noise whose loudness rises and falls, f32 at 16 kHz."""
    g = torch.Generator().manual_seed(seed)
    sound = torch.randn(round(seconds * RATE), generator=g) * 0.1
    return sound * sine(3, RATE, seconds).float().clamp(min=0)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.01, 4.3, 30])
def test_features_equal_transformers(mels, seconds):
    theirs = WhisperFeatureExtractor(feature_size=mels)
    assert np.abs(mel_filters(mels).numpy() - theirs.mel_filters.T).max() < 1e-12
    sound = speechlike(seconds)
    want = theirs(sound.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"][0].t()
    got = log_mel(sound, mels, 3000)
    assert got.shape == (3000, mels) and got.dtype == torch.float32 and got.is_contiguous()
    assert (got - want).abs().max() < 1e-4
    assert torch.equal(log_mel(sound, mels, 3000), got)


def test_features_of_silence_and_of_short_windows():
    silent = log_mel(torch.zeros(0), 80, 3000)
    assert (silent == (-10 + 4) / 4).all()
    sound = speechlike(0.4)
    short = log_mel(sound, 24, 40)
    assert short.shape == (40, 24) and torch.isfinite(short).all()
    with pytest.raises(AssertionError, match="hold"):
        log_mel(torch.zeros(40 * HOP + 1), 24, 40)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_what_both_rates_can_hold_stays_as_it_was(rate):
    for hz in (50, 1000, 3500, 7000):
        if hz > 0.44 * rate:
            continue
        got = resample(sine(hz, rate).float(), rate)
        assert len(got) == RATE and got.dtype == torch.float32
        middle = slice(1000, -1000)
        assert (got - sine(hz, RATE))[middle].abs().max() < 1e-3, hz


@pytest.mark.parametrize("hz", [8600, 11000, 20000])
def test_what_the_lower_rate_cannot_hold_is_gone(hz):
    """Else it would come back as another sound."""
    assert resample(sine(hz, 44100).float(), 44100)[1000:-1000].abs().max() < 1e-3


@pytest.mark.parametrize(("rate", "count"), [(44101, 9000), (15999, 3), (7919, 4000), (48000, 1), (8000, 1)])
def test_any_rate_and_any_length(rate, count):
    sound = torch.ones(count)
    got = resample(sound, rate)
    assert len(got) == -(-count * RATE // rate) and torch.isfinite(got).all()
    if count > 3000:
        assert (got[1000:-1000] - 1).abs().max() < 1e-4
    assert resample(sound, RATE) is sound


def wav(path, samples, width=2, rate=RATE, channels=1):
    """A file from values between -1 and 1, [frames] or [frames, channels]."""
    values = np.asarray(samples, np.float64)
    if width == 1:
        raw = np.clip(np.round(values * 128 + 128), 0, 255).astype(np.uint8).tobytes()
    else:
        most = 1 << (8 * width - 1)
        whole = np.clip(np.round(values * most), -most, most - 1).astype("<i8")
        raw = whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(raw)
    return path


@pytest.mark.parametrize(("width", "off"), [(1, 0.005), (2, 2e-5), (3, 2e-7), (4, 1e-7)])
def test_samples_of_any_width(tmp_path, width, off):
    sound = sine(440, RATE) * 0.9
    got = read_wav(wav(tmp_path / "a.wav", sound, width))
    assert got.dtype == torch.float32 and (got - sound).abs().max() < off
    extremes = read_wav(wav(tmp_path / "b.wav", [-1.0, 0.0, 1.0], width))
    assert extremes[0] == -1 and extremes[1] == 0 and 0.99 < extremes[2] <= 1


def test_channels_are_mixed_and_rates_made_one(tmp_path):
    left, right = sine(440, 44100) * 0.8, sine(1000, 44100) * 0.2
    got = read_wav(wav(tmp_path / "a.wav", torch.stack((left, right), 1), rate=44100, channels=2))
    want = (sine(440, RATE) * 0.8 + sine(1000, RATE) * 0.2) / 2
    assert len(got) == RATE and (got - want)[1000:-1000].abs().max() < 1e-3


def riff(*, kind=1, channels=1, rate=16000, bits=16, data=b"\0\0" * 50, size=None):
    """A WAV file's bytes, each field at will."""
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data"
    body += struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("raw", "error", "named"),
    [
        (b"", UsageError, "it ends early"),
        (b"hello, this is no sound", UsageError, "no WAV file"),
        (riff()[:30], UsageError, "no WAV file"),
        (riff(kind=3, bits=32), UsageError, "unknown format: 3"),
        (riff(kind=85), UsageError, "unknown format: 85"),
        (riff(data=b""), UsageError, "holds no sound"),
        (riff(size=2**32 - 2), StorageError, "promises 4,294,967,294 bytes"),
        (riff(size=1000), StorageError, "truncated"),
        (riff(channels=65), UsageError, "65 channels"),
        (riff(rate=10), UsageError, "10 Hz"),
        (riff(rate=2**31), UsageError, "2,147,483,648 Hz"),
        (riff(channels=0), UsageError, "no WAV file"),
        (riff(bits=64), UsageError, "64 bits"),
        (riff(bits=0), UsageError, "no WAV file"),
    ],
)
def test_what_is_no_sound_is_told_in_one_line(tmp_path, raw, error, named):
    path = tmp_path / "x.wav"
    path.write_bytes(raw)
    with pytest.raises(error, match=named) as caught:
        read_wav(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_any_beginning_of_a_file_is_sound_or_one_line(tmp_path):
    raw, path = riff(data=b"\1\2" * 20), tmp_path / "x.wav"
    for stop in range(len(raw)):
        path.write_bytes(raw[:stop])
        with pytest.raises((UsageError, StorageError)):
            read_wav(path)
    path.write_bytes(raw)
    assert len(read_wav(path)) == 20


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(StorageError, match="can't be read"):
            read_wav(path)
