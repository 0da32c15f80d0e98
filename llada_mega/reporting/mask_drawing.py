"""``llada-mega mask``: an attention mask as text in the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llada_mega.reporting.mask_layout import (
    TILE,
    DrawnMask,
    count_tiles,
    draw_layout,
    quadrant,
    row_intervals,
    same_row_groups,
    tile_coverage,
)
from llada_mega.reporting.mask_options import MaskOptions, check_mask_options

LABEL_WIDTH = 15
MAX_GROUPS = 24  # rows of the interval table
STYLES = {"noisy → noisy": "dark_orange", "noisy → clean": "dodger_blue1", "clean → clean": "green4", "tokens": "blue"}
GLYPHS = {"noisy → noisy": "█", "noisy → clean": "▓", "clean → clean": "▒", "tokens": "█"}
HIDDEN = "·"
SHADES = " ░▒▓█"


def draw_mask(options: MaskOptions, console: Console | None = None) -> Path | None:
    """Print the mask, its intervals and its live area; write ``options.output`` when it is given and return its path.

    Raises ConfigError when the options contradict each other.
    """
    check_mask_options(options)
    console = console or Console()
    drawn = draw_layout(options)
    console.print(heading(options, drawn))
    console.print()
    for line in mask_text(drawn, console.width):
        console.print(line, no_wrap=True, overflow="crop", soft_wrap=True)
    console.print()
    console.print(legend(drawn))
    console.print()
    console.print(interval_table(drawn))
    if options.output is None:
        return None
    from llada_mega.reporting.mask_picture import save_picture  # matplotlib takes a second, text does not need it

    path = save_picture(options, drawn, Path(options.output))
    console.print(f"picture: {path}", soft_wrap=True, highlight=False)
    return path


def heading(options: MaskOptions, drawn: DrawnMask) -> Text:
    """What is drawn, and how much of it is live."""
    documents = len(options.documents)
    what = [f"layout {options.layout}"]
    if options.layout == "bdlm":
        what.append(f"block size {options.block_size}, counted from the {options.block_origin}")
    what.append(f"{documents} document{'s' * (documents > 1)}, {sum(options.documents):,} tokens")
    lines = Text(" · ".join(what) + "\n", style="bold")
    lines.append(size_line(drawn) + "\n")
    lines.append(f"live area {100 * drawn.live_share():.1f} % ({drawn.mask.area():,} visible pairs)")
    if drawn.size > 2 * TILE:
        tiles = count_tiles(drawn.mask)
        lines.append(
            f"\nlive {TILE}-tiles {tiles.live:,} of {tiles.total:,} ({100 * tiles.live / tiles.total:.1f} %), "
            f"{tiles.full:,} of them full"
        )
    return lines


def size_line(drawn: DrawnMask) -> str:
    """'16 noisy + 8 clean rows and keys (8 clean tokens that nobody sees are left out)'."""
    if len(drawn.halves) == 1:
        name, start, stop = drawn.halves[0]
        text = f"{stop - start:,} {'noisy ' * (name == 'noisy')}rows and keys"
    else:
        text = " + ".join(f"{stop - start:,} {name}" for name, start, stop in drawn.halves) + " rows and keys"
    if drawn.left_out:
        plural = "s" * (drawn.left_out > 1)
        text += f" ({drawn.left_out:,} clean token{plural} that no noisy token sees left out)"
    return text


def legend(drawn: DrawnMask) -> Text:
    """One glyph a kind of attention."""
    line = Text("legend  ", style="dim")
    for region in regions(drawn):
        line.append(GLYPHS[region] * 2, style=STYLES[region])
        line.append(f" {'sees' if region == 'tokens' else region}   ", style="default")
    line.append(HIDDEN * 2, style="dim")
    line.append(" does not see", style="default")
    return line


def regions(drawn: DrawnMask) -> list[str]:
    """Kinds of attention the mask has, in reading order."""
    names = [name for name, _, _ in drawn.halves]
    found = [drawn.region(row, key) for row in names for key in names]
    return [region for region in found if region is not None]


def mask_text(drawn: DrawnMask, width: int) -> list[Text]:
    """Rows of the drawing: one cell a (row, key) pair where they fit, else tiles shaded by how full they are."""
    room = width - LABEL_WIDTH
    borders = len(drawn.segments) - 1
    for cell in (2, 1):
        if cell * drawn.size + borders <= room:
            return _cells(drawn, cell)
    return _tiles(drawn, max(room, 16))


def _cells(drawn: DrawnMask, cell: int) -> list[Text]:
    dense = drawn.mask.dense().numpy()
    lines = [_column_header(drawn, cell, by_half=True), _column_header(drawn, cell, by_half=False)]
    for number, rows in enumerate(drawn.segments):
        if number:
            lines.append(_rule(drawn, cell, heavy=rows.half != drawn.segments[number - 1].half))
        for row in range(rows.start, rows.stop):
            label = f"{rows.half} doc {rows.document}" if row == rows.start else ""
            line = Text(f"{label:<{LABEL_WIDTH}}", style="bold" if label else "default")
            for index, keys in enumerate(drawn.segments):
                if index:
                    line.append("┃" if keys.half != drawn.segments[index - 1].half else "│", style="dim")
                region = drawn.region(rows.half, keys.half)
                for key in range(keys.start, keys.stop):
                    if region and dense[row, key]:
                        line.append(GLYPHS[region] * cell, style=STYLES[region])
                    else:
                        line.append(HIDDEN * cell, style="dim")
            lines.append(line)
    return lines


def _column_header(drawn: DrawnMask, cell: int, *, by_half: bool) -> Text:
    line = Text(" " * LABEL_WIDTH)
    for number, keys in enumerate(drawn.segments):
        new_half = number == 0 or keys.half != drawn.segments[number - 1].half
        label = (f"{keys.half}" if new_half else "") if by_half else f"doc {keys.document}"
        span = cell * (keys.stop - keys.start) + (1 if number + 1 < len(drawn.segments) else 0)
        if by_half and new_half:  # a half's name may run over its documents
            same = [segment for segment in drawn.segments if segment.half == keys.half]
            total = cell * (same[-1].stop - same[0].start) + len(same)
            line.append(label[:total].ljust(total), style="bold")
        elif not by_half:
            line.append(label[: max(span - 1, 0)].ljust(span), style="dim")
    return line


def _rule(drawn: DrawnMask, cell: int, *, heavy: bool) -> Text:
    dash, parts = ("━" if heavy else "─"), []
    for number, keys in enumerate(drawn.segments):
        if number:
            heavy_column = keys.half != drawn.segments[number - 1].half
            parts.append(("╋" if heavy_column else "┿") if heavy else ("╂" if heavy_column else "┼"))
        parts.append(dash * cell * (keys.stop - keys.start))
    return Text(" " * LABEL_WIDTH + "".join(parts), style="dim")


def _tiles(drawn: DrawnMask, room: int) -> list[Text]:
    """Each half starts a new tile; a character is as high as two are wide, so a tile has twice as many rows as keys."""
    tile = 1
    while sum(-(-(stop - start) // tile) for _, start, stop in drawn.halves) + len(drawn.halves) - 1 > room:
        tile *= 2
    lines = [_tile_header(drawn, tile)]
    for number, (row_half, first, last) in enumerate(drawn.halves):
        if number:
            widths = [-(-(stop - start) // tile) for _, start, stop in drawn.halves]
            lines.append(Text(" " * LABEL_WIDTH + "╋".join("━" * width for width in widths), style="dim"))
        shares = [_tile_shares(drawn, (first, last), (start, stop), tile) for _, start, stop in drawn.halves]
        for row in range(shares[0].shape[0]):
            line = Text(f"{row_half if row == 0 else '':<{LABEL_WIDTH}}", style="bold")
            for index, (key_half, _, _) in enumerate(drawn.halves):
                if index:
                    line.append("┃", style="dim not bold")
                style = STYLES.get(drawn.region(row_half, key_half) or "", "dim")
                for share in shares[index][row]:
                    line.append(_shade(share), style=f"{style} not bold")
            lines.append(line)
    scale = f"a character is {2 * tile} rows by {tile} keys; shade: share that is visible"
    lines.append(Text("\n" + " " * LABEL_WIDTH + scale, style="dim"))
    return lines


def _tile_header(drawn: DrawnMask, tile: int) -> Text:
    header = Text(" " * LABEL_WIDTH)
    for name, start, stop in drawn.halves:
        width = -(-(stop - start) // tile)
        header.append(name[:width].ljust(width + 1), style="bold")
    return header


def _tile_shares(drawn: DrawnMask, rows: tuple[int, int], keys: tuple[int, int], tile: int) -> np.ndarray:
    """Visible share of each tile of ``2 tile`` rows by ``tile`` keys, float64 [row tiles, key tiles]."""
    fine = tile_coverage(quadrant(drawn, rows, keys), tile)
    if fine.shape[0] % 2:
        fine = np.concatenate((fine, np.zeros_like(fine[:1])))
    pairs = fine[::2] + fine[1::2]
    heights = np.minimum(2 * tile, rows[1] - rows[0] - 2 * tile * np.arange(pairs.shape[0]))
    widths = np.minimum(tile, keys[1] - keys[0] - tile * np.arange(pairs.shape[1]))
    return pairs / (heights[:, None] * widths)


def _shade(share: float) -> str:
    """A glyph that is blank only when nothing is visible."""
    return HIDDEN if share == 0 else SHADES[min(int(share * 4) + 1, 4)]


def interval_table(drawn: DrawnMask) -> Table:
    """Which rows see which tokens, equal rows together: the form in which the mask is stored."""
    title = "intervals, in token positions"
    table = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False)
    for name in ("rows", "document", "block", "sees"):
        table.add_column(name, header_style="dim", no_wrap=name != "sees")
    groups = same_row_groups(drawn.mask)
    segments = iter(drawn.segments)
    segment = next(segments)
    for start, stop in groups[:MAX_GROUPS]:
        while start >= segment.stop:
            segment = next(segments)
        sees = Text(" \N{UNION} ").join(_interval(drawn, low, high) for low, high in row_intervals(drawn.mask, start))
        block = str(drawn.block_S[start]) if drawn.layout == "bdlm" else ""
        rows = f"{segment.half} {_tokens(drawn, start, stop)}"
        table.add_row(rows, str(segment.document), block, sees or Text("nothing"))
    if len(groups) > MAX_GROUPS:
        table.add_row(f"… {len(groups) - MAX_GROUPS:,} more", "", "", "")
    return table


def _interval(drawn: DrawnMask, low: int, high: int) -> Text:
    half = next(name for name, start, stop in drawn.halves if start <= low < stop)
    region = {"noisy": "noisy → noisy", "clean": "noisy → clean"}.get(half, half)
    return Text(f"{half} {_tokens(drawn, low, high)}", style=STYLES[region])


def _tokens(drawn: DrawnMask, start: int, stop: int) -> str:
    return f"[{drawn.token_S[start]}, {drawn.token_S[stop - 1] + 1})"
