"""The mathematics of masked block diffusion in pure torch: no process group, no config file, no model.

Equation numbers are those of the LLaDA2.0 report (arXiv 2512.15745). Read in this order: ``schedule`` (alpha_t),
``noise_levels`` (t), ``corruption`` (x_t), ``visibility`` (who sees whom), ``objectives`` (weights and denominators),
``curriculum`` (block sizes over time); ``random`` and ``blocks`` serve them.
"""

from __future__ import annotations
