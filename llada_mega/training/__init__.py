"""The training loop and the callbacks that carry its features.

Read ``trainer.py`` (the loop), ``step.py`` (one optimizer step), ``run.py`` (how a run is put together), then
``callbacks/``.
"""
