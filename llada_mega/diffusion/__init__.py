"""The mathematics of masked block diffusion in pure torch: no process group, no config file, no model.

Equation numbers are those of the LLaDA2.0 report (arXiv 2512.15745). Read in this order: ``schedule`` (alpha_t),
``noise_levels`` (t), ``corruption`` (x_t), ``visibility`` (who sees whom), ``objectives`` (weights and denominators),
``stages`` and ``curriculum`` (block sizes over time); ``random`` and ``blocks`` serve them.
"""

from __future__ import annotations

from llada_mega.diffusion.blocks import BlockIndex, index_blocks
from llada_mega.diffusion.corruption import corrupt
from llada_mega.diffusion.curriculum import Curriculum, build_curriculum
from llada_mega.diffusion.noise_levels import draw_noise_levels
from llada_mega.diffusion.objectives import DiffusionObjective, Objective
from llada_mega.diffusion.random import Stream, normal, normal_channels, uniform
from llada_mega.diffusion.schedule import Schedule, get_schedule
from llada_mega.diffusion.stages import ResolvedStage, StageObjective
from llada_mega.diffusion.visibility import Visibility, build_visibility

__all__ = [
    "BlockIndex",
    "Curriculum",
    "DiffusionObjective",
    "Objective",
    "ResolvedStage",
    "Schedule",
    "StageObjective",
    "Stream",
    "Visibility",
    "build_curriculum",
    "build_visibility",
    "corrupt",
    "draw_noise_levels",
    "get_schedule",
    "index_blocks",
    "normal",
    "normal_channels",
    "uniform",
]
