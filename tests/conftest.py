"""What all tests share: settings only."""

import io
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

import kvik.cli
from helpers import BACKENDS
from kvik.ops import loader

# For the processes that tests start: torch's idle workers give the core back soon. Set before torch loads in them.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Files that are named run in this process: others would take as long to load torch. Folders: as xdist decides."""
    return None if any(Path(argument).is_dir() for argument in config.args) else 0


def pytest_collection_modifyitems(items):
    """Files that need real weights first: they take longest, and whoever had one last would be waited for."""
    heavy = {item.path for item in items if item.get_closest_marker("weights")}
    items.sort(key=lambda item: item.path not in heavy)


settings.register_profile("kvik", derandomize=True, deadline=None)
settings.load_profile("kvik")

KERNELS = loader.built()


@pytest.fixture(params=BACKENDS)
def ops(request, monkeypatch):
    """Each implementation of append, attend and compact in turn."""
    monkeypatch.setenv("KVIK_OPS", request.param)
    return request.param


@pytest.fixture
def plain(monkeypatch):
    """The reference, where a test breaks something inside it."""
    monkeypatch.setenv("KVIK_OPS", "reference")


@pytest.fixture(scope="session")
def smollm2_in():
    """SmolLM2 with weights in a format, loaded once: for tests that change nothing in it."""
    from kvik.models import model

    honest = model.load  # before a test replaces it
    return cache(lambda weights: honest("smollm2", weights=weights))


@pytest.fixture
def loaded_once(monkeypatch, smollm2_in):
    """What loads SmolLM2 from now on gets the one that others had too."""
    from kvik.models import model

    honest = model.load

    def load(name="smollm2", *, weights="auto", device="cpu", share=None, progress=None):
        if (name, device, share) != ("smollm2", "cpu", None):
            return honest(name, weights=weights, device=device, share=share, progress=progress)
        return smollm2_in("int4" if weights == "auto" else weights)

    monkeypatch.setattr(model, "load", load)


@pytest.fixture
def kvik_here(monkeypatch, capsys):
    """`kvik` with these arguments, in this process: its exit code and what it printed, as of a process of its own."""

    def run(*arguments, stdin="", home=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["kvik", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            if home is not None:
                patch.setenv("KVIK_HOME", str(home))
            with pytest.raises(SystemExit) as stopped:
                kvik.cli.main()
        out, errors = capsys.readouterr()
        return SimpleNamespace(returncode=stopped.value.code, stdout=out, stderr=errors)

    return run


@pytest.fixture(params=KERNELS.available() if KERNELS else [])
def isa(request):
    """Each instruction set that this machine has, in turn."""
    before = KERNELS.isa()
    assert KERNELS.use(request.param)
    yield request.param
    KERNELS.use(before)
