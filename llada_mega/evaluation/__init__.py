"""Held-out losses: NLL bound, masked cross entropy and accuracy by block size and noise level, and the AR loss."""

from llada_mega.evaluation.losses import evaluate
from llada_mega.evaluation.scoring import ModelScorer, RowScores, Scorer

__all__ = ["ModelScorer", "RowScores", "Scorer", "evaluate"]
