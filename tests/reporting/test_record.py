"""Reading run directories: whole ones, those still being written, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_mega.errors import DataError
from llada_mega.reporting.comparison import Comparison, compare_evaluations, compare_run, noise_bounds
from llada_mega.reporting.facts import curriculum_line, findings, parameter_counts, planned_steps, status, wall_seconds
from llada_mega.reporting.record import read_run
from tests.reporting.fake_run import config, evaluation, training_rows, write_fake_run, write_json, write_rows


def test_a_whole_run(tmp_path: Path) -> None:
    record = read_run(write_fake_run(tmp_path / "quickstart"))
    assert record.name == "quickstart"
    assert [row["step"] for row in record.training] == list(range(1, 61))
    assert [row["step"] for row in record.validation] == [0, 10, 20, 30, 40, 50, 60]
    assert [(stage.name, stage.block_size, stage.first_step, stage.last_step) for stage in record.stages] == [
        ("block_1", 1, 1, 20), ("block_4", 4, 21, 40), ("block_8", 8, 41, 60)
    ]  # fmt: skip
    assert record.notes == []
    assert status(record) == ("finished", "finished after 60 steps")


def test_stages_may_be_logged_by_name(tmp_path: Path) -> None:
    rows = [{"step": step, "stage": "warm", "block_size": 4, "layout": "bdlm", "loss": 1.0} for step in (1, 2)]
    write_rows(tmp_path, rows)
    assert [stage.name for stage in read_run(tmp_path).stages] == ["warm"]


def test_a_truncated_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    write_fake_run(tmp_path, finished=False)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 35, "loss": 4.', encoding="utf-8")
    record = read_run(tmp_path)
    assert record.training[-1]["step"] == 34
    assert record.notes == ["The last line of metrics.jsonl is incomplete and was left out."]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in training_rows([1], 6)]
    lines[2] = lines[2][:40]
    lines[4] = '"a string"'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = read_run(tmp_path)
    assert [row["step"] for row in record.training] == [1, 2, 4, 6]
    assert any("2 lines" in note and "first: line 3" in note for note in record.notes)


def test_of_resumed_segments_the_last_row_of_a_step_counts(tmp_path: Path) -> None:
    rows = training_rows([1, 4], 20)
    again = [{**row, "loss": 99.0} for row in rows[10:16]]
    write_rows(tmp_path, rows[:14] + again)
    record = read_run(tmp_path)
    assert [row["step"] for row in record.training] == list(range(1, 17))
    assert [row["step"] for row in record.training if row["loss"] == 99.0] == list(range(11, 17))
    assert any("resumed (at step 11)" in note for note in record.notes)


def test_a_validation_row_of_the_same_step_is_no_resume(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 1, "valid/ar_nll": 3.0}, {"step": 2, "loss": 2.0}])
    record = read_run(tmp_path)
    assert not any("resumed" in note for note in record.notes)
    assert len(record.training) == 2
    assert len(record.validation) == 1


def test_warnings_of_the_run_are_kept_once(tmp_path: Path) -> None:
    row = {"step": 3, "warning": "the loss jumped"}
    write_rows(tmp_path, [{"step": 3, "loss": 9.0}, row, row])
    assert read_run(tmp_path).warnings == ["step 3: the loss jumped"]


@pytest.mark.parametrize("content", ["{", "[1, 2]", "not json"])
def test_damaged_side_files_are_notes(tmp_path: Path, content: str) -> None:
    write_fake_run(tmp_path)
    (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    (tmp_path / "sample.json").write_text('{"steps": 3}', encoding="utf-8")
    record = read_run(tmp_path)
    assert record.summary == {}
    assert record.sample is None
    assert len(record.notes) == 2


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        read_run(tmp_path / "missing")
    with pytest.raises(DataError, match=r"neither metrics\.jsonl nor config\.yaml"):
        read_run(tmp_path)


def test_parameter_counts_of_the_published_models() -> None:
    moe = {"num_experts": 256, "top_k": 8, "expert_ffn_hidden_size": 512, "shared_expert_ffn_hidden_size": 512,
           "first_dense_layers": 1}  # fmt: skip
    mini = {"num_layers": 20, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 4, "head_dim": 128,
            "ffn_hidden_size": 5120, "vocab_size": 157184, "qk_norm": True, "moe": moe}  # fmt: skip
    assert parameter_counts(mini) == (16_255_638_528, 1_432_968_192)
    wide = {**moe, "expert_ffn_hidden_size": 1024, "shared_expert_ffn_hidden_size": 1024}
    flash = {**mini, "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 9216,
             "moe": wide}  # fmt: skip
    assert parameter_counts(flash) == (102_889_697_280, 6_152_269_824)
    assert parameter_counts({"hidden_size": 4}) is None


def test_planned_steps_and_progress(tmp_path: Path) -> None:
    write_fake_run(tmp_path, finished=False)
    record = read_run(tmp_path)
    assert planned_steps(record) == 60
    assert status(record) == ("unfinished", "unfinished: 34 of 60 steps")
    record.config["trainer"]["max_steps"] = 34
    assert status(record)[0] == "finished"


def test_wall_time_is_measured_or_estimated(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "consumed_tokens": 100 * step, "tokens_per_s": 50.0} for step in (1, 2, 4)]
    write_rows(tmp_path, rows)
    assert wall_seconds(read_run(tmp_path)) == (pytest.approx(8.0), False)
    write_json(tmp_path / "summary.json", {"total_seconds": 12.5})
    assert wall_seconds(read_run(tmp_path)) == (12.5, True)


def test_findings(tmp_path: Path) -> None:
    rows = training_rows([1], 10, moe=True)
    rows[3]["grad_norm"] = float("nan")
    rows[5]["loss"] = float("inf")
    rows[6]["applied"] = False
    rows[-1]["dead_experts"] = 2
    rows += [{"step": 0, "valid/ar_nll": 3.0}, {"step": 10, "valid/ar_nll": 3.4}]
    write_rows(tmp_path, rows)
    found = " ".join(findings(read_run(tmp_path)))
    assert "gradient norm was not finite at step 4" in found
    assert "loss was not finite at step 6" in found
    assert "1 of the logged steps were skipped, the first at step 7" in found
    assert "no token in the last logged step: 2" in found
    assert "AR loss rose by 0.40 nats" in found
    assert findings(read_run(write_fake_run(tmp_path / "healthy"))) == []


def test_the_curriculum_in_one_line(tmp_path: Path) -> None:
    sizes = [1, 4, 32, 64, 4096, 2048, 32]
    write_rows(tmp_path, training_rows(sizes, 70))
    stages = read_run(tmp_path).stages
    assert curriculum_line(stages[:3]) == "1 → 4 → 32"
    assert curriculum_line(stages) == "1 … 4096 … 32"


def test_comparison_of_evaluations() -> None:
    rows = {(row.block_size, row.label): row for row in compare_evaluations(evaluation(0.0), evaluation(1.0))}
    assert rows[8, "Masked CE"].change == pytest.approx(5.83 - 9.15)
    assert rows[8, "Masked CE"].verdict == "better"
    assert rows[8, "Accuracy"].verdict == "better"
    assert rows[None, "AR loss"].verdict == "same"
    worse = {(row.block_size, row.label): row for row in compare_evaluations(evaluation(1.0), evaluation(0.0))}
    assert worse[8, "Masked CE"].verdict == worse[8, "Accuracy"].verdict == "worse"
    assert Comparison("AR loss", "kept", 3.0, 3.2).verdict == "worse"
    assert Comparison("Masked CE", "loss", None, 3.2).verdict == "unknown"


def test_where_before_and_after_come_from(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    table = compare_run(read_run(run))
    assert table is not None
    assert {row.block_size for row in table.rows} == {1, 4, 8, None}
    assert [row.block_size for row in table.headline] == [8, 4, 1, None]
    (run / "eval_before.json").unlink()
    (run / "eval_after.json").unlink()
    table = compare_run(read_run(run))
    assert table is not None
    assert [(row.block_size, row.before, row.after) for row in table.rows] == [
        (1, 6.13, 3.77), (8, 9.15, 5.83), (None, 3.152, 3.118)
    ]  # fmt: skip
    (run / "summary.json").unlink()
    write_json(run / "eval_before.json", evaluation(0.0))
    table = compare_run(read_run(run))
    assert table is not None
    assert (table.before_name, table.after_name) == ("before", "step 60")
    (run / "eval_before.json").unlink()
    table = compare_run(read_run(run))
    assert table is not None
    assert (table.before_name, table.after_name) == ("step 0", "step 60")
    write_rows(run, training_rows([1], 3))
    assert compare_run(read_run(run)) is None


@pytest.mark.parametrize(
    ("level", "bounds"), [("0-0.125", (0.0, 0.125)), ("0.75-1.00", (0.75, 1.0)), ("high", (0.0, 1.0))]
)
def test_noise_bounds(level: str, bounds: tuple[float, float]) -> None:
    assert noise_bounds(level) == bounds


def test_the_fake_configuration_has_the_real_keys() -> None:
    from llada_mega.config.schema import Config

    fake = config("run", [1, 4], 10)
    for group, values in fake.items():
        assert hasattr(Config(), group)
        if isinstance(values, dict):
            assert not [key for key in values if not hasattr(getattr(Config(), group), key)]
