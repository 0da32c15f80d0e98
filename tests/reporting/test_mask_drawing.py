"""Drawings of masks against the dense mask: text cell by cell, tiles by sums, pictures by what they contain."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.console import Console

from llada_mega.errors import ConfigError
from llada_mega.reporting.mask_drawing import GLYPHS, HIDDEN, LABEL_WIDTH, draw_mask, mask_text
from llada_mega.reporting.mask_layout import count_tiles, draw_layout, row_intervals, same_row_groups, tile_coverage
from llada_mega.reporting.mask_options import MaskOptions, check_mask_options
from llada_mega.reporting.mask_picture import draw_mask_axes

SMALL = [
    MaskOptions(),
    MaskOptions(documents=[5, 1, 4], block_size=3, clean_tokens="all"),
    MaskOptions(documents=[7, 6], block_size=4, block_origin="sequence"),
    MaskOptions(documents=[6], block_size=1),
    MaskOptions(documents=[4, 3], block_size=8),
    MaskOptions(documents=[5, 4], layout="mdlm"),
    MaskOptions(documents=[5, 4], layout="ar"),
]
options_of_any_kind = st.builds(
    MaskOptions,
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    block_size=st.integers(1, 20),
    layout=st.sampled_from(["bdlm", "mdlm", "ar"]),
    clean_tokens=st.sampled_from(["needed", "all"]),
    block_origin=st.sampled_from(["document", "sequence"]),
)


def printed(options: MaskOptions, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    draw_mask(options, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("options", SMALL, ids=lambda options: f"{options.layout}-{options.documents}")
@pytest.mark.parametrize("cell", [1, 2])
def test_text_shows_the_dense_mask(options: MaskOptions, cell: int) -> None:
    drawn = draw_layout(options)
    dense = drawn.mask.dense().numpy()
    borders = len(drawn.segments) - 1
    lines = [line.plain for line in mask_text(drawn, LABEL_WIDTH + cell * drawn.size + borders)]
    rows = [line[LABEL_WIDTH:] for line in lines[2:]]
    rows = [row for row in rows if not set(row) & set("─━")]
    assert len(rows) == drawn.size
    for row, text in enumerate(rows):
        cells = text.replace("│", "").replace("┃", "")[::cell]
        assert [character != HIDDEN for character in cells] == dense[row].tolist()
        noisy = [index for index, character in enumerate(cells) if character == GLYPHS["noisy → noisy"]]
        if options.layout == "bdlm":
            assert all(index < sum(options.documents) for index in noisy)


def test_text_names_halves_documents_and_shares() -> None:
    text = printed(MaskOptions(documents=[10, 6], block_size=4))
    for part in ("noisy doc 0", "noisy doc 1", "clean doc 0", "clean doc 1", "legend", "noisy → clean"):
        assert part in text
    assert "16 noisy + 12 clean rows and keys (4 clean tokens that no noisy token sees left out)" in text
    drawn = draw_layout(MaskOptions(documents=[10, 6], block_size=4))
    share = drawn.mask.dense().float().mean().item()
    assert f"live area {100 * share:.1f} %" in text
    assert "noisy [8, 10)   0         2      noisy [8, 10) \N{UNION} clean [0, 8)" in text


def test_wide_masks_are_drawn_in_tiles_that_fit() -> None:
    options = MaskOptions(documents=[300, 212], block_size=32)
    drawn = draw_layout(options)
    lines = [line.plain for line in mask_text(drawn, 100)]
    assert max(map(len, lines)) <= 100
    assert "a character is" in lines[-1]
    body = [line[LABEL_WIDTH:] for line in lines[1:-1] if "━" not in line]
    tile = int(lines[-1].split(" rows by ")[1].split()[0])
    dense = drawn.mask.dense().numpy()
    total = sum(options.documents)
    for number, line in enumerate(body[: -(-total // (2 * tile))]):
        left, right = line.split("┃")
        rows = slice(2 * tile * number, min(2 * tile * (number + 1), total))
        for half, text in ((dense[rows, :total], left), (dense[rows, total:], right)):
            seen = [half[:, at : at + tile].any() for at in range(0, half.shape[1], tile)]
            assert [character != HIDDEN for character in text] == seen
    assert "live 128-tiles" in printed(options)
    assert "live 128-tiles" not in printed(MaskOptions(documents=[10, 6]))


@settings(max_examples=60, deadline=None)
@given(options_of_any_kind, st.sampled_from([1, 3, 8, 16, 64]))
def test_tile_coverage_equals_sums_of_the_dense_mask(options: MaskOptions, tile: int) -> None:
    mask = draw_layout(options).mask
    dense = mask.dense().numpy()
    coverage = tile_coverage(mask, tile)
    padded = np.pad(dense, [(0, -size % tile) for size in dense.shape]).astype(np.int64)
    rows, keys = padded.shape[0] // tile, padded.shape[1] // tile
    expected = padded.reshape(rows, tile, keys, tile).sum((1, 3))
    assert np.array_equal(coverage, expected)
    area = np.minimum(tile, dense.shape[0] - tile * np.arange(rows))[:, None] * np.minimum(
        tile, dense.shape[1] - tile * np.arange(keys)
    )
    tiles = count_tiles(mask, tile)
    assert (tiles.total, tiles.live, tiles.full) == (expected.size, (expected > 0).sum(), (expected == area).sum())


@settings(max_examples=40, deadline=None)
@given(options_of_any_kind)
def test_row_groups_and_intervals_describe_the_mask(options: MaskOptions) -> None:
    drawn = draw_layout(options)
    rebuilt = torch.zeros(drawn.size, drawn.mask.total_k, dtype=torch.bool)
    for start, stop in same_row_groups(drawn.mask):
        for low, high in row_intervals(drawn.mask, start):
            rebuilt[start:stop, low:high] = True
    assert torch.equal(rebuilt, drawn.mask.dense())
    assert [segment.stop for segment in drawn.segments[:-1]] == [segment.start for segment in drawn.segments[1:]]
    assert drawn.segments[-1].stop == drawn.size == drawn.block_edges[-1]


def test_the_rows_that_padding_would_have_see_nothing() -> None:
    mask = IntervalMask.causal([3, 2], padding=[False, True])
    assert row_intervals(mask, 4) == []
    assert tile_coverage(mask, 2).sum() == 6


@pytest.mark.parametrize("options", SMALL, ids=lambda options: f"{options.layout}-{options.documents}")
def test_small_pictures_have_a_square_for_every_visible_pair(options: MaskOptions) -> None:
    drawn = draw_layout(options)
    axis = Figure().add_subplot()
    draw_mask_axes(axis, drawn)
    shown = np.zeros((drawn.size, drawn.size), dtype=bool)
    for collection in axis.collections:
        if isinstance(collection, PatchCollection):
            for path in collection.get_paths():
                column, row = path.get_extents().min.astype(int)
                assert not shown[row, column]
                shown[row, column] = True
    assert np.array_equal(shown, drawn.mask.dense().numpy())


def test_large_pictures_show_tiles_and_never_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    options = MaskOptions(documents=[3000, 1096], block_size=256)
    drawn = draw_layout(options)
    dense = drawn.mask.dense().numpy()
    monkeypatch.setattr(IntervalMask, "dense", lambda self: pytest.fail("a large mask was made dense"))
    axis = Figure().add_subplot()
    draw_mask_axes(axis, drawn)
    total = sum(options.documents)
    images = [image for image in axis.get_images() if isinstance(image, AxesImage)]
    assert len(images) == 3
    for image in images:
        left, right, bottom, top = image.get_extent()
        alpha = np.asarray(image.get_array())[..., 3]
        tile = round((right - left) / alpha.shape[1])
        rows, keys = slice(int(top), total if top < total else drawn.size), slice(int(left), int(right))
        part = dense[rows, keys.start : min(keys.stop, total if left < total else drawn.size)]
        padded = np.pad(part, [(0, -size % tile) for size in part.shape])
        seen = padded.reshape(alpha.shape[0], tile, alpha.shape[1], tile).any((1, 3))
        assert np.array_equal(alpha > 0, seen)
        assert bottom - top == alpha.shape[0] * tile
    assert max(image.get_array().shape[0] for image in images) <= 512


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_written(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"mask.{suffix}"
    assert draw_mask(MaskOptions(output=str(output)), Console(file=io.StringIO())) == output
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert output.read_bytes().startswith(start)


def test_a_very_long_mask_is_quick_and_small() -> None:
    text = printed(MaskOptions(documents=[65536, 65536], block_size=32))
    assert "262,080" not in text  # the sizes are named by half
    assert "131,072 noisy + 131,008 clean" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "documents="),
        ({"documents": [4, 0]}, "documents="),
        ({"documents": [1 << 21]}, "at most"),
        ({"block_size": 0}, "block_size=0"),
        ({"layout": "dense"}, "layout=dense"),
        ({"clean_tokens": "some"}, "clean_tokens=some"),
        ({"block_origin": "batch"}, "block_origin=batch"),
        ({"cp": 2}, "cp=2: which rank owns which rows cannot be drawn yet"),
        ({"output": "mask.txt"}, r"output=mask\.txt"),
        ({"output": "/no/such/place/mask.png"}, "does not exist"),
    ],
)
def test_options_that_cannot_be_drawn(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_mask_options(MaskOptions(**change))  # type: ignore[arg-type]


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "mask.png").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        draw_mask(MaskOptions(output=str(tmp_path / "mask.png")), Console(file=io.StringIO()))
