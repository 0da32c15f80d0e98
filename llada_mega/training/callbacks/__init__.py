"""Features of a run, one callback a file. ``build_callbacks`` in ``training/run.py`` chooses and orders them."""
