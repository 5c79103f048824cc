"""`import kvik` offers exactly these names, and every one of them can be had."""

import pytest

import kvik

NAMES = [
    "Bytes", "Cache", "Generation", "KvikError", "LayerShape", "Model", "Request", "Sampling", "Sequence", "Spec",
    "generate", "load",
]  # fmt: skip


def test_the_names_are_exactly_these():
    assert sorted(kvik.__all__) == NAMES
    assert sorted(dir(kvik)) == sorted([*NAMES, "__version__"])


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_it_says(name):
    assert getattr(kvik, name).__name__ == name
    assert getattr(kvik, name).__doc__


def test_inside_transformers_the_names_are_these():
    import kvik.hf

    assert kvik.hf.__all__ == dir(kvik.hf) == ["Cache", "PrefixCache", "TransformersModel"]
    for name in kvik.hf.__all__:
        assert getattr(kvik.hf, name).__name__ == name and getattr(kvik.hf, name).__doc__
    with pytest.raises(AttributeError, match=r"'kvik\.hf' has no attribute 'Cash'"):
        kvik.hf.Cash  # noqa: B018


def test_a_name_that_is_not_there_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="'kvik' has no attribute 'cash'"):
        kvik.cash  # noqa: B018
    with pytest.raises(ImportError, match="cash"):
        exec("from kvik import cash")


def test_a_star_gives_the_same_names():
    given = {}
    exec("from kvik import *", given)
    assert sorted(given.keys() - {"__builtins__"}) == NAMES
