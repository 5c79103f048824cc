"""Kernels that are there and can't be loaded: one line that says what to do, never slower without a word."""

import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
from safetensors import _safetensors_rust

import kvik
from kvik.errors import StorageError
from kvik.ops import backend, loader, reference

CPU = torch.device("cpu")


@pytest.fixture(params=["damaged", "foreign"])
def broken(request, monkeypatch, tmp_path):
    """A file that stands where the kernels should be."""
    file = tmp_path / f"_native{EXTENSION_SUFFIXES[0]}"
    if request.param == "damaged":
        file.write_bytes(b"\x7fELF and no more")
    else:
        shutil.copy(_safetensors_rust.__file__, file)
    # An editable install has a finder of its own, which knows where the kernels lie.
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "importlib" in getattr(f, "__module__", "")])
    monkeypatch.setattr(kvik, "__path__", [str(tmp_path), *kvik.__path__])
    monkeypatch.delitem(sys.modules, "kvik._native", raising=False)
    monkeypatch.delenv("KVIK_OPS", raising=False)
    caches = (loader._found, loader.native)
    for cached in caches:
        cached.cache_clear()
    yield file
    for cached in caches:
        cached.cache_clear()


def test_kernels_that_can_not_be_loaded_are_named_with_the_way_out(broken, monkeypatch):
    for ask in (loader.built, loader.chosen, loader.native, lambda: backend.backend(CPU)):
        with pytest.raises(StorageError) as refused:
            ask()
        message = str(refused.value)
        assert message.startswith(f"{broken}: the kernels can't be loaded (") and "\n" not in message
        assert message.count(str(broken)) == 1 and "KVIK_OPS=reference" in message and "slower" in message
    monkeypatch.setenv("KVIK_OPS", "native")
    with pytest.raises(StorageError, match="can't be loaded"):
        loader.chosen()


def test_the_reference_serves_beside_kernels_that_can_not_be_loaded(broken, monkeypatch):
    monkeypatch.setenv("KVIK_OPS", "reference")
    assert loader.built() is None and loader.chosen() is None
    assert backend.backend(CPU) is reference
