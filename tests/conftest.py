"""What all tests share: settings only."""

import os

import pytest
from hypothesis import settings

from kvik.ops import loader

# For the processes that tests start: torch's idle workers give the core back soon. Set before torch loads in them.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

settings.register_profile("kvik", derandomize=True, deadline=None)
settings.load_profile("kvik")

KERNELS = loader.built()
BACKENDS = ["reference", *(["native"] if KERNELS else [])]


@pytest.fixture(params=BACKENDS)
def ops(request, monkeypatch):
    """Each implementation of append, attend and compact in turn."""
    monkeypatch.setenv("KVIK_OPS", request.param)
    return request.param


@pytest.fixture
def plain(monkeypatch):
    """The reference, where a test breaks something inside it."""
    monkeypatch.setenv("KVIK_OPS", "reference")


@pytest.fixture(params=KERNELS.available() if KERNELS else [])
def isa(request):
    """Each instruction set that this machine has, in turn."""
    before = KERNELS.isa()
    assert KERNELS.use(request.param)
    yield request.param
    KERNELS.use(before)
