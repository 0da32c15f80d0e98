"""The Python API: what notebooks import.

::

    import llada_mega

    model = llada_mega.load_model("runs/quickstart")
    out = model.generate(model.tokenizer.encode("The capital of France"), max_new_tokens=64)
    print(model.tokenizer.decode(out.token_ids))
"""

from __future__ import annotations

from llada_mega.inference import Generation, LoadedModel, load_model

__all__ = ["Generation", "LoadedModel", "load_model"]
