"""Operators: what mixes a model's tokens. Each knows a whole text at once, for training, and a step with a cache."""

from __future__ import annotations

from kvik.models.forms import Cost, Form
from kvik.models.operators.attention import SelfAttention
from kvik.models.operators.bucketed import BucketedTranslution
from kvik.models.operators.geometry import Geometry, Grid, Line
from kvik.models.operators.lor import LoRTranslution
from kvik.models.operators.operator import Init, Operator
from kvik.models.operators.translution import Convolution, Translution

__all__ = [
    "BucketedTranslution",
    "Convolution",
    "Cost",
    "Form",
    "Geometry",
    "Grid",
    "Init",
    "Line",
    "LoRTranslution",
    "Operator",
    "SelfAttention",
    "Translution",
    "geometry",
    "grid",
    "make",
]


def geometry(form: Form, length: int, causal: bool = True) -> Line:
    """Where a text's tokens stand to one another, as an operator tells them apart."""
    starts = form.starts(length) if form.kind == "bucketed" else (0,) if form.kind == "attention" else None
    kernel = form.kind == "convolution"
    reach = form.number if causal else form.number // 2 + 1  # a kernel's side, or one of its two sides
    return Line(min(reach, length) if kernel else length, causal, starts, cut=kernel)


def grid(form: Form, height: int, width: int) -> Grid:
    """The same of a picture's patches and its class token."""
    return Grid(height, width, form.reach(), cut=form.kind == "convolution")


def make(
    form: Form, d: int, heads: int, head_dim: int, where: Geometry, *, reads: bool = False, init: Init = "linear"
) -> Operator:
    """An operator with newly drawn weights.

    Args:
        where: of `geometry` or `grid`.
        reads: see `SelfAttention`.
        init: see `Offsets`.
    """
    if form.kind == "attention":
        return SelfAttention(d, heads, head_dim, where, form.positions, reads)
    if form.kind == "convolution":
        return Convolution(d, heads, head_dim, where, init)
    if form.kind == "lor":
        return LoRTranslution(d, heads, head_dim, where, form.relative, form.number, init)
    kind = Translution if form.kind == "translution" else BucketedTranslution
    return kind(d, heads, head_dim, where, form.relative, init)
