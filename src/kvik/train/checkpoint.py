"""A trained model as a folder: complete, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvik.errors import StorageError
from kvik.train.examination import Exam
from kvik.train.phrases import KINDS, LANGUAGES
from kvik.train.translator import Training
from kvik.train.vocabulary import save

NOTE = "training.json"  # tells our folders from others


def check_folder(folder: Path) -> None:
    """Complains about a folder that can't be written, or that holds something else than a training of before.

    Raises:
        StorageError: either.
    """
    if folder.exists() and not (folder / NOTE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(
            f"{folder}: is there and was not trained by kvik, so it is not replaced; name another folder"
        )
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: can't be written, since {parent} can't; name another folder with --out")


def write(training: Training, folder: Path, exam: Exam, report: dict[str, Any]) -> None:
    """Puts a transformers folder with weights in bf16 in its place, in one move.

    Raises:
        StorageError: it can't be written; what was there before stays.
    """
    replace_folder(folder, lambda work: _fill(training, work, exam, report))


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Puts a folder in its place, in one move, when all that `fill` writes is there.

    Raises:
        StorageError: it can't be written; what was there before stays.
    """
    work = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        fill(work)
        for path in work.iterdir():
            path.chmod(0o644)  # safetensors makes files that their owner alone can read
        if folder.exists():
            old = work.with_name(f"{work.name}-old")
            folder.replace(old)
            try:
                work.replace(folder)
            except OSError:
                old.replace(folder)
                raise
            shutil.rmtree(old)
        else:
            work.replace(folder)
    except OSError as error:
        raise StorageError(f"{folder}: can't be written ({error.strerror or error}); name another with --out") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(training: Training, folder: Path, exam: Exam, report: dict[str, Any]) -> None:
    from transformers.utils import logging

    network = training.network
    network.config.tie_word_embeddings = False  # transformers 5 says True of every T5
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network.to(torch.bfloat16).save_pretrained(folder)
    finally:
        network.float()
        if shown:
            logging.enable_progress_bar()
    save(training.tokenizer, folder)
    kinds = {kind: {to: round(exam.share(to, kind), 4) for to in LANGUAGES} for kind in KINDS}
    note = {
        **report, "recipe": asdict(training.recipe), "steps": training.steps,
        "exact": {to: round(exam.share(to), 4) for to in LANGUAGES}, "exact_by_kind": kinds,
        "sentences": len(exam.answers) // len(LANGUAGES),
    }  # fmt: skip
    (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
