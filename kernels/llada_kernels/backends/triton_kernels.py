"""Triton kernels of attention over the live tiles of an interval mask: forward, and the three of the backward.

A program owns one tile (of rows in the forward and for dQ, of keys for dK and dV) and one head, and walks the tiles of
the other side that its list names: first the full ones, in a loop without a mask, then the partial ones, where the
endpoints of the rows decide. Each result is written by one program, so there are no atomics and the bits repeat.

Importing this module imports triton; under ``TRITON_INTERPRET=1`` the kernels run on the CPU in its interpreter.

Legend: M query rows of a tile, N keys of a tile, D head dim (``BLOCK_D``, the next power of two, in the kernels).
Scores are kept in base 2, so that exp2 needs no factor; the log-sum-exp that leaves the forward is natural.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Their alignment and value change from mask to mask and buy nothing: not a reason to compile again.
_LISTS = ["ORDER", "FULL_OFFSETS", "FULL", "PARTIAL_OFFSETS", "PARTIAL"]
_SIZES = ["total_q", "total_k"]


@triton.jit
def _load_tile(
    base,
    start,
    stride,
    limit,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows ``start ..`` of a head as ``[BLOCK, BLOCK_D]``; 0 beyond the head dim and, if BOUNDED, beyond ``limit``."""
    row = tl.arange(0, BLOCK)
    feature = tl.arange(0, BLOCK_D)
    pointers = base + start.to(tl.int64) * stride + row[:, None] * stride + feature[None, :]
    if BOUNDED:
        mask = (start + row < limit)[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (feature < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(feature < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store_tile(base, start, stride, limit, tile, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = tl.arange(0, BLOCK)
    feature = tl.arange(0, BLOCK_D)
    pointers = base + start.to(tl.int64) * stride + row[:, None] * stride + feature[None, :]
    mask = (start + row < limit)[:, None] & (feature < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _visible(ENDPOINTS, row, key, total_q, NFUNC: tl.constexpr):
    """Which rows see which keys; the shapes of ``row`` and ``key`` broadcast. Rows beyond the last see nothing."""
    inside = row < total_q
    seen = key < tl.load(ENDPOINTS + row, mask=inside, other=0)
    for i in tl.static_range(1, NFUNC, 2):
        low = tl.load(ENDPOINTS + i * total_q + row, mask=inside, other=0)
        high = tl.load(ENDPOINTS + (i + 1) * total_q + row, mask=inside, other=0)
        seen = seen | ((key >= low) & (key < high))
    return seen


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_LISTS)
def forward_kernel(
    Q,
    K,
    V,
    OUTPUT,
    LSE,
    ENDPOINTS,
    ORDER,
    FULL_OFFSETS,
    FULL,
    PARTIAL_OFFSETS,
    PARTIAL,
    scale,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    total_q,
    total_k,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NFUNC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """OUTPUT ``[B, S, Hq, D]`` and LSE float32 ``[B, Hq, S]``, both contiguous. Grid: (B * Hq, row tiles)."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    tile = tl.load(ORDER + tl.program_id(1))
    start = tile * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    query = _load_tile(
        Q + batch * stride_qb + head * stride_qh, start, stride_qs, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True
    )
    K += batch * stride_kb + head // GROUP * stride_kh
    V += batch * stride_vb + head // GROUP * stride_vh

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for MASKED in tl.static_range(2):
        TILES, OFFSETS = (PARTIAL, PARTIAL_OFFSETS) if MASKED else (FULL, FULL_OFFSETS)
        for i in range(tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1)):
            key_start = tl.load(TILES + i) * BLOCK_N
            key = _load_tile(K, key_start, stride_ks, total_k, BLOCK_N, BLOCK_D, HEAD_DIM, MASKED)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
            if MASKED:
                column = key_start + tl.arange(0, BLOCK_N)
                seen = _visible(ENDPOINTS, row[:, None], column[None, :], total_q, NFUNC)
                score = tl.where(seen, score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            shift = new_peak
            if MASKED:  # a row may have seen nothing so far: -inf - -inf
                shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            probability = tl.exp2(score - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(probability, 1)
            value = _load_tile(V, key_start, stride_vs, total_k, BLOCK_N, BLOCK_D, HEAD_DIM, MASKED)
            accumulator = accumulator * decay[:, None]
            accumulator = tl.dot(probability.to(value.dtype), value, accumulator, input_precision=PRECISION)
            peak = new_peak

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(LSE + (batch * HEADS + head) * total_q + row, lse, mask=row < total_q)
    OUTPUT += batch * total_q * HEADS * HEAD_DIM + head * HEAD_DIM
    _store_tile(OUTPUT, start, HEADS * HEAD_DIM, total_q, accumulator / total[:, None], BLOCK_M, BLOCK_D, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES)
def statistics_kernel(
    OUTPUT,
    GRAD_OUTPUT,
    LSE,
    GRAD_LSE,
    LSE_2,
    DELTA,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_lb,
    stride_ls,
    stride_lh,
    total_q,
    padded_q,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """What the backward needs to know of each row: LSE_2 and DELTA, float32 ``[B, Hq, padded_q]``.

    DELTA = sum(O * dO) - dLSE is what dP is reduced by: the softmax gives dS = P * (dP - sum(O * dO)), and LSE adds
    P * dLSE to it. LSE_2 is the log-sum-exp in base 2. Rows that see nothing or are beyond the last get +inf and 0:
    their probabilities are 0 without a mask. Grid: (B * Hq, padded_q / BLOCK_M).
    """
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    start = tl.program_id(1) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    inside = row < total_q
    OUTPUT += batch * total_q * HEADS * HEAD_DIM + head * HEAD_DIM
    GRAD_OUTPUT += batch * stride_gb + head * stride_gh
    output = _load_tile(OUTPUT, start, HEADS * HEAD_DIM, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    grad = _load_tile(GRAD_OUTPUT, start, stride_gs, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    GRAD_LSE += batch * stride_lb + head * stride_lh
    grad_lse = tl.load(GRAD_LSE + row.to(tl.int64) * stride_ls, mask=inside, other=0.0)
    delta = tl.sum(output.to(tl.float32) * grad.to(tl.float32), 1) - grad_lse
    lse = tl.load(LSE + (batch * HEADS + head) * total_q + row, mask=inside, other=float("-inf"))
    blind = lse == float("-inf")
    place = (batch * HEADS + head) * padded_q + row
    tl.store(LSE_2 + place, tl.where(blind, float("inf"), lse * LOG2_E))
    tl.store(DELTA + place, tl.where(blind, 0.0, delta))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_LISTS)
def query_gradient_kernel(
    Q,
    K,
    V,
    GRAD_OUTPUT,
    LSE_2,
    DELTA,
    GRAD_Q,
    ENDPOINTS,
    ORDER,
    FULL_OFFSETS,
    FULL,
    PARTIAL_OFFSETS,
    PARTIAL,
    scale,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_gb,
    stride_gs,
    stride_gh,
    total_q,
    padded_q,
    total_k,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NFUNC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GRAD_Q ``[B, S, Hq, D]``, contiguous. Grid: (B * Hq, row tiles)."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    tile = tl.load(ORDER + tl.program_id(1))
    start = tile * BLOCK_M
    Q += batch * stride_qb + head * stride_qh
    GRAD_OUTPUT += batch * stride_gb + head * stride_gh
    K += batch * stride_kb + head // GROUP * stride_kh
    V += batch * stride_vb + head // GROUP * stride_vh
    query = _load_tile(Q, start, stride_qs, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    grad_output = _load_tile(GRAD_OUTPUT, start, stride_gs, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    row = start + tl.arange(0, BLOCK_M)
    place = (batch * HEADS + head) * padded_q + row
    lse = tl.load(LSE_2 + place)
    delta = tl.load(DELTA + place)

    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        TILES, OFFSETS = (PARTIAL, PARTIAL_OFFSETS) if MASKED else (FULL, FULL_OFFSETS)
        for i in range(tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1)):
            key_start = tl.load(TILES + i) * BLOCK_N
            key = _load_tile(K, key_start, stride_ks, total_k, BLOCK_N, BLOCK_D, HEAD_DIM, MASKED)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
            probability = tl.exp2(score - lse[:, None])
            if MASKED:
                column = key_start + tl.arange(0, BLOCK_N)
                seen = _visible(ENDPOINTS, row[:, None], column[None, :], total_q, NFUNC)
                probability = tl.where(seen, probability, 0.0)
            value = _load_tile(V, key_start, stride_vs, total_k, BLOCK_N, BLOCK_D, HEAD_DIM, MASKED)
            grad_probability = tl.dot(grad_output, tl.trans(value), input_precision=PRECISION)
            grad_score = probability * (grad_probability - delta[:, None])
            grad_query = tl.dot(grad_score.to(key.dtype), key, grad_query, input_precision=PRECISION)
    GRAD_Q += batch * total_q * HEADS * HEAD_DIM + head * HEAD_DIM
    _store_tile(GRAD_Q, start, HEADS * HEAD_DIM, total_q, grad_query * scale, BLOCK_M, BLOCK_D, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_LISTS)
def key_value_gradient_kernel(
    Q,
    K,
    V,
    GRAD_OUTPUT,
    LSE_2,
    DELTA,
    GRAD_K,
    GRAD_V,
    ENDPOINTS,
    ORDER,
    FULL_OFFSETS,
    FULL,
    PARTIAL_OFFSETS,
    PARTIAL,
    scale,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_gb,
    stride_gs,
    stride_gh,
    total_q,
    padded_q,
    total_k,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NFUNC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GRAD_K and GRAD_V ``[B, K, Hk, D]``, contiguous, summed over a key head's queries. Grid: (B * Hk, key tiles).

    Scores are computed transposed, ``[N, M]``, so that both products that follow take them as they are.
    """
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    batch = (tl.program_id(0) // KEY_HEADS).to(tl.int64)
    key_head = tl.program_id(0) % KEY_HEADS
    tile = tl.load(ORDER + tl.program_id(1))
    start = tile * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    K += batch * stride_kb + key_head * stride_kh
    V += batch * stride_vb + key_head * stride_vh
    key = _load_tile(K, start, stride_ks, total_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    value = _load_tile(V, start, stride_vs, total_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    head = key_head * GROUP
    Q += batch * stride_qb + head * stride_qh
    GRAD_OUTPUT += batch * stride_gb + head * stride_gh
    LSE_2 += (batch * HEADS + head) * padded_q
    DELTA += (batch * HEADS + head) * padded_q

    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        TILES, OFFSETS = (PARTIAL, PARTIAL_OFFSETS) if MASKED else (FULL, FULL_OFFSETS)
        for i in range(tl.load(OFFSETS + tile) * GROUP, tl.load(OFFSETS + tile + 1) * GROUP):
            row_start = tl.load(TILES + i // GROUP) * BLOCK_M
            row = row_start + tl.arange(0, BLOCK_M)
            head = i % GROUP
            lse = tl.load(LSE_2 + head * padded_q + row)
            delta = tl.load(DELTA + head * padded_q + row)
            query = _load_tile(Q + head * stride_qh, row_start, stride_qs, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
            score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2_E)
            probability = tl.exp2(score - lse[None, :])
            if MASKED:
                seen = _visible(ENDPOINTS, row[None, :], column[:, None], total_q, NFUNC)
                probability = tl.where(seen, probability, 0.0)
            grad_output = _load_tile(
                GRAD_OUTPUT + head * stride_gh, row_start, stride_gs, total_q, BLOCK_M, BLOCK_D, HEAD_DIM, True
            )
            grad_value = tl.dot(probability.to(query.dtype), grad_output, grad_value, input_precision=PRECISION)
            grad_probability = tl.dot(value, tl.trans(grad_output), input_precision=PRECISION)
            grad_score = probability * (grad_probability - delta[None, :])
            grad_key = tl.dot(grad_score.to(query.dtype), query, grad_key, input_precision=PRECISION)
    offset = batch * total_k * KEY_HEADS * HEAD_DIM + key_head * HEAD_DIM
    _store_tile(GRAD_K + offset, start, KEY_HEADS * HEAD_DIM, total_k, grad_key * scale, BLOCK_N, BLOCK_D, HEAD_DIM)
    _store_tile(GRAD_V + offset, start, KEY_HEADS * HEAD_DIM, total_k, grad_value, BLOCK_N, BLOCK_D, HEAD_DIM)
