"""Random interval masks for the tests of this package."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from llada_kernels import IntervalMask


@st.composite
def any_masks(draw: st.DrawFn, max_rows: int = 40) -> IntervalMask:
    """Block-diffusion masks with rows and keys left out, and masks of arbitrary intervals."""
    random = draw(st.randoms(use_true_random=False))
    kind = draw(st.sampled_from(["arbitrary", "block_diffusion", "mdlm", "causal", "block_causal"]))
    if kind == "arbitrary":
        nfunc, rows, keys = random.choice([1, 3, 5, 7]), random.randint(1, max_rows), random.randint(1, max_rows)
        columns = [sorted(random.randint(0, keys) for _ in range(nfunc)) for _ in range(rows)]
        columns = [column if random.random() > 0.2 else [0] * nfunc for column in columns]
        return IntervalMask(torch.tensor(columns, dtype=torch.int32).T.contiguous(), keys)
    documents = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    padding = [random.random() < 0.15 for _ in documents]
    block_size = () if kind in ("mdlm", "causal") else (random.choice([1, 2, 4, 5, 64]),)
    mask: IntervalMask = getattr(IntervalMask, kind)(documents, *block_size, padding=padding)
    if random.random() < 0.5:
        mask = mask.select_keys(sorted(random.sample(range(mask.total_k), random.randint(1, mask.total_k))))
        mask = mask.select_rows(random.sample(range(mask.total_q), random.randint(1, mask.total_q)))
    return mask
