"""The README's picture: written for whole and partial runs, with the right stages and numbers in it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.text import Text

from llada_mega.reporting import readme_figure
from llada_mega.reporting.readme_figure import main, stages_to_draw, write_readme_figure
from llada_mega.reporting.record import read_run
from tests.reporting.fake_run import sample, training_rows, write_fake_run, write_json, write_rows


def texts(run: Path) -> set[str]:
    figure = readme_figure._figure(read_run(run))
    return {text.get_text() for text in figure.findobj(Text)}


def test_a_whole_run(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    output = write_readme_figure(run, tmp_path / "figure.png")
    height, width, _ = matplotlib.image.imread(output).shape
    assert width == 2600
    assert 0.4 < height / width < 0.7
    shown = texts(run)
    assert {"block size 1", "block size 4", "block size 8", "9.150", "5.830", "3.118", "Held-out loss"} <= shown
    assert {"is", "short", "expression", "step 0", "step 5"} <= shown


def test_without_validation_and_sample(tmp_path: Path) -> None:
    write_rows(tmp_path, training_rows([4, 64], 30))
    shown = texts(tmp_path)
    assert {"Training loss", "block size 4", "block size 64"} <= shown
    assert not {"Held-out loss", "Before and after", "step 0"} & shown


def test_dollars_and_newlines_in_tokens_are_text(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", steps=12)
    content = {**sample(), "prompt": "$a$ costs $", "steps": [["$x_", None], ["$x_", "\n"]]}
    write_json(run / "sample.json", content)
    assert "↵" in texts(run)
    write_readme_figure(run, tmp_path / "figure.png")


def test_stages_that_are_drawn(tmp_path: Path) -> None:
    write_rows(tmp_path, training_rows([1, 4, 32, 64, 4096, 2048, 128, 32], 80))
    stages = read_run(tmp_path).stages
    assert [stage.block_size for stage in stages_to_draw(stages)] == [1, 4096, 32]
    assert [stage.block_size for stage in stages_to_draw(stages[:3])] == [1, 4, 32]
    assert [stage.block_size for stage in stages_to_draw(stages[:1])] == [1]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"run": {"name": "early"}}), encoding="utf-8")
    assert main([str(tmp_path), str(tmp_path / "figure.png")]) == 2
    assert "no step logged yet" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "usage:" in capsys.readouterr().err
    write_rows(tmp_path, training_rows([8], 3))
    assert main([str(tmp_path), str(tmp_path / "figure.webm")]) == 2
    assert "cannot write the picture" in capsys.readouterr().err
