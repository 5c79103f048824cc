"""The spec that `kvik tune` chose for a model, so that `--kv tuned` finds it: tuned/<fingerprint>.json in kvik's home.

The fingerprint names the weights as they are held, and the arithmetic: what was measured with int4 weights is not
taken for f32 weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvik.errors import SpecError, StorageError
from kvik.models.files.prepare import home, home_path

_FORMAT = "tuned-1"


def path_of(fingerprint: str) -> Path:
    """Where the choice for a model is kept, or would be."""
    return home_path() / "tuned" / f"{fingerprint}.json"


def recall(fingerprint: str, model: str, weights: str) -> str:
    """The spec string that was chosen for a model.

    Args:
        fingerprint: of the model.
        model, weights: its name and how its weights are held, for the message.

    Raises:
        SpecError: nothing was chosen.
        StorageError: the file is damaged or can't be read.
    """
    path = path_of(fingerprint)
    try:
        values = json.loads(path.read_bytes())
        if values["kvik"] != _FORMAT or values["fingerprint"] != fingerprint or not isinstance(values["spec"], str):
            raise ValueError
        return str(values["spec"])
    except FileNotFoundError:
        raise SpecError(
            f"spec 'tuned': nothing was tuned for {model} with weights {weights} here; run "
            "'kvik tune --max-kl 0.01' with the same --model and --weights, or name a spec, such as int8"
        ) from None
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror}); run 'kvik tune' again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(f"{path}: is damaged, so no tuned spec is known; run 'kvik tune' again") from None


def remember(fingerprint: str, model: str, weights: str, spec: str, why: dict[str, Any]) -> Path:
    """Keeps a choice, in the place of an earlier one; returns its file.

    Args:
        fingerprint, model, weights: see `recall`.
        spec: that was chosen.
        why: what it was chosen by, as JSON values, for people who look into the file.

    Raises:
        StorageError: kvik's home can't be written.
    """
    home()
    path = path_of(fingerprint)
    partial = path.with_suffix(f".{os.getpid()}")
    values = {"kvik": _FORMAT, "fingerprint": fingerprint, "model": model, "weights": weights, "spec": spec, "why": why}
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror}); set KVIK_HOME to a folder that can") from None
    return path
