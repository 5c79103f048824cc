"""`kvik trace`: one text through the cache, and what each step asks, keeps, computes, and need not compute."""

from kvik.trace.page import check_target, layers_that_fit, make_page, write_page
from kvik.trace.recording import Difference, Frame, Guess, Look, Trace, check_index, collect, record
from kvik.trace.summary import facts
from kvik.trace.view import render

__all__ = [
    "Difference",
    "Frame",
    "Guess",
    "Look",
    "Trace",
    "check_index",
    "check_target",
    "collect",
    "facts",
    "layers_that_fit",
    "make_page",
    "record",
    "render",
    "write_page",
]
