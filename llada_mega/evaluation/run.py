"""``eval``: a model and a held-out corpus in, losses as JSON out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llada_mega.data.indexed import open_corpus
from llada_mega.data.windows import validation_windows
from llada_mega.errors import ConfigError
from llada_mega.evaluation.losses import evaluate
from llada_mega.inference.loading import load_model


def run_eval(
    checkpoint: str | Path,
    data: str | Path,
    *,
    output: str | Path | None = None,
    block_sizes: Sequence[int] = (1, 8, 32),
    sequence_length: int = 128,
    windows: int = 64,
    noise_levels: int = 8,
    draws: int = 1,
    batch_size: int = 8,
    block_origin: str = "document",
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    on_pass: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on an indexed corpus.

    Args:
        checkpoint: anything that ``load_model`` opens.
        data: prefix of an indexed dataset (PREFIX.bin and PREFIX.idx) that was not trained on.
        output: JSON file to write; None writes none.
        block_sizes: which to evaluate; an empty sequence leaves only the autoregressive loss.
        sequence_length: tokens of a window.
        windows: how many.
        noise_levels, draws, batch_size, block_origin, seed: see :func:`llada_mega.evaluation.losses.evaluate`.
        device, dtype: where and in which precision the model runs.
        on_pass: called with (forward passes done, passes in all).
    Returns:
        what :func:`evaluate` returns, and under ``settings`` how it was measured.
    Raises:
        CheckpointError, DataError, ConfigError: one of the inputs cannot be used; checked before the model runs.
    """
    model = load_model(checkpoint, device=device, dtype=dtype)
    if sequence_length < 2 or windows < 1:
        raise ConfigError(f"sequence_length={sequence_length} and windows={windows}: use at least 2 and 1")
    if sequence_length > model.config.max_position_embeddings:
        raise ConfigError(
            f"sequence_length={sequence_length} exceeds the model's {model.config.max_position_embeddings} positions"
        )
    corpus = open_corpus(data, tokenizer=model.tokenizer, vocab_size=model.config.vocab_size)
    result = evaluate(
        model,
        validation_windows(corpus, None, sequence_length, windows),
        block_sizes=block_sizes,
        noise_levels=noise_levels,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
        block_origin=block_origin,
        on_pass=on_pass,
    )
    result["settings"] = {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "sequence_length": sequence_length,
        "windows": windows,
        "draws": draws,
        "block_origin": block_origin,
        "seed": seed,
        "dtype": dtype,
    }
    if output is not None:
        write_evaluation(result, Path(output))
    return result


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    """Write an evaluation as JSON. Raises ConfigError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written: {error.strerror or error}") from error
