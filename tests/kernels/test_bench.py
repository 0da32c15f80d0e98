"""The benchmark measures what it says it measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llada_kernels import interval_attention
from llada_kernels.bench import __main__ as bench
from llada_kernels.bench import cases, measure

SHAPE = cases.Shape(4, 2, 16, torch.float32)
CPU = torch.device("cpu")


def test_cases_tile_their_length() -> None:
    everything = cases.all_cases()
    assert len({case.name for case in everything}) == len(everything)
    assert all(sum(case.document_lengths()) == case.length for case in everything)
    uneven = cases.Case(4096, cases.UNEVEN, 4).document_lengths()
    assert len(uneven) == 17 and max(uneven) > 5 * min(uneven)


def test_measures_every_candidate() -> None:
    results = measure.measure(cases.Case(64, 3, 4), SHAPE, CPU, gemm_flops=1e9)
    assert [r.candidate for r in results][:1] == ["cpu"] and results[-1].candidate == measure.DENSE
    mask = cases.Case(64, 3, 4).mask()
    for r in results:
        assert r.max_error < 2e-5 and r.milliseconds > 0
        assert r.live_share == pytest.approx(float(mask.dense().float().mean()))
        # forward: 2 products, backward: 5, each 2 FLOPs a pair, head and feature, at 1 GFLOP/s
        assert r.floor_milliseconds == pytest.approx(14 * mask.area() * 4 * 16 / 1e6)
    assert results[-1].dense_ratio == 1.0
    assert results[-1].peak_mib >= (4 * 128 * 128 + 128 * 128) / 2**20  # its mask, and that as float


def test_a_wrong_kernel_shows_in_the_error(monkeypatch: Any) -> None:
    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        return interval_attention(query, key, value, mask) + 0.01 * value.sum()

    monkeypatch.setattr(measure, "candidates", lambda device, shape: {"wrong": wrong})
    (result,) = measure.measure(cases.Case(64, 1, 4), SHAPE, CPU, gemm_flops=1e9)
    assert result.max_error > 1e-3 and result.dense_ratio is None


def test_the_command_prints_and_writes(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--lengths", "64", "--output", str(tmp_path)])
    monkeypatch.setattr(cases, "DOCUMENTS", (1, 2))
    bench.main()
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert len(record["results"]) == 2 * len({r["case"] for r in record["results"]})
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    assert "L=64 documents=2 mdlm" in capsys.readouterr().out
