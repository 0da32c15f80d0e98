"""The training loop and the callbacks that carry its features.

Read ``trainer.py`` (the loop), ``step.py`` (one optimizer step), ``run.py`` (how a run is put together), then
``callbacks/``.
"""

import llada_mega.parallel  # noqa: F401  first: it decides which optional libraries Megatron-Core sees
