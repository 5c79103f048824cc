"""`kvik bench` and `kvik doctor`: what a cache saves and costs, how fast kvik is here, and what the machine is.
Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.lazy import loader

if TYPE_CHECKING:
    from kvik.bench.examination import examine as examine
    from kvik.bench.growth import Growth as Growth
    from kvik.bench.machine import Machine as Machine
    from kvik.bench.machine_view import render_machine as render_machine
    from kvik.bench.picture import curves as curves
    from kvik.bench.picture import slope as slope
    from kvik.bench.runs import measure as measure
    from kvik.bench.speed import Speed as Speed
    from kvik.bench.speed_picture import draw_speed as draw_speed
    from kvik.bench.speed_runs import measure_speed as measure_speed
    from kvik.bench.speed_view import render_speed as render_speed
    from kvik.bench.view import render as render

_HOMES = {
    "Growth": "kvik.bench.growth",
    "Machine": "kvik.bench.machine",
    "Speed": "kvik.bench.speed",
    "curves": "kvik.bench.picture",
    "draw_speed": "kvik.bench.speed_picture",
    "examine": "kvik.bench.examination",
    "measure": "kvik.bench.runs",
    "measure_speed": "kvik.bench.speed_runs",
    "render": "kvik.bench.view",
    "render_machine": "kvik.bench.machine_view",
    "render_speed": "kvik.bench.speed_view",
    "slope": "kvik.bench.picture",
}
__all__ = sorted(_HOMES)
__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return list(__all__)
