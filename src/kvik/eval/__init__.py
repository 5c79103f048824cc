"""`kvik eval`, `kvik tune` and `kvik heads`: what a cache costs in quality and bytes, and which one to take.
Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.lazy import loader

if TYPE_CHECKING:
    from kvik.eval.grids import draw_heads as draw_heads
    from kvik.eval.grids import draw_map as draw_map
    from kvik.eval.grids import draw_needles as draw_needles
    from kvik.eval.grids import mapped as mapped
    from kvik.eval.heads import Heads as Heads
    from kvik.eval.heads import measure_heads as measure_heads
    from kvik.eval.heads_view import render_heads as render_heads
    from kvik.eval.ledger import Ledger as Ledger
    from kvik.eval.picture import draw_frontier as draw_frontier
    from kvik.eval.results import Evaluation as Evaluation
    from kvik.eval.results import Measured as Measured
    from kvik.eval.results import Setup as Setup
    from kvik.eval.runs import evaluate as evaluate
    from kvik.eval.tuning import Tuning as Tuning
    from kvik.eval.tuning import tune as tune
    from kvik.eval.tuning_view import render_tuning as render_tuning
    from kvik.eval.view import render_evaluation as render_evaluation

_HOMES = {
    "Evaluation": "kvik.eval.results",
    "Heads": "kvik.eval.heads",
    "Ledger": "kvik.eval.ledger",
    "Measured": "kvik.eval.results",
    "Setup": "kvik.eval.results",
    "Tuning": "kvik.eval.tuning",
    "draw_frontier": "kvik.eval.picture",
    "draw_heads": "kvik.eval.grids",
    "draw_map": "kvik.eval.grids",
    "draw_needles": "kvik.eval.grids",
    "evaluate": "kvik.eval.runs",
    "mapped": "kvik.eval.grids",
    "measure_heads": "kvik.eval.heads",
    "render_evaluation": "kvik.eval.view",
    "render_heads": "kvik.eval.heads_view",
    "render_tuning": "kvik.eval.tuning_view",
    "tune": "kvik.eval.tuning",
}
__all__ = sorted(_HOMES)
__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return list(__all__)
