"""`kvik plan`: Spec × model × machine → what fits, before a byte is allocated. Needs no torch."""

from kvik.models.shapes.families import from_config
from kvik.models.shapes.shape import ModelShape
from kvik.models.shapes.wellknown import known_models
from kvik.plan.arithmetic import WEIGHTS, Fit, Plan, WeightFormat, make_plan
from kvik.plan.asked import list_plans, run_plan
from kvik.plan.find import lookup
from kvik.plan.view import render_list, render_plan, render_refusals

__all__ = [
    "WEIGHTS",
    "Fit",
    "ModelShape",
    "Plan",
    "WeightFormat",
    "from_config",
    "known_models",
    "list_plans",
    "lookup",
    "make_plan",
    "render_list",
    "render_plan",
    "render_refusals",
    "run_plan",
]
