"""Held-out losses: exact where they can be, unbiased elsewhere, the same under every split."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch
from llada_mega.data.sample import Sample
from llada_mega.errors import ConfigError
from llada_mega.evaluation import ModelScorer, RowScores, evaluate
from llada_mega.evaluation.losses import level_name, stratified_levels
from llada_mega.inference import LoadedModel
from llada_mega.models import BlockDiffusionModel, build_model
from tests.models import reference
from tests.models.helpers import MASK_ID, dense_config, hf_weights, random_ids, randomize

CONFIG = dense_config("llama", num_layers=2, mask_token_id=MASK_ID, pad_token_id=2)


@pytest.fixture(scope="module")
def model() -> BlockDiffusionModel:
    model = build_model(CONFIG, dtype=torch.float64)
    randomize(model)
    return model


def sample(lengths: list[int], seed: int, padding: int = 0) -> Sample:
    """Documents of these lengths, then a padding document."""
    length = sum(lengths)
    tokens = torch.cat([random_ids(CONFIG, length, seed)[0], torch.zeros(padding, dtype=torch.int64)])
    return Sample(
        tokens,
        lengths + [padding] * bool(padding),
        [False] * len(lengths) + [True] * bool(padding),
        torch.arange(length + padding) < length,
        seed,
    )


SAMPLES = [sample([9, 7], 0), sample([16], 1), sample([5], 2, padding=11), sample([3, 13], 3)]


def log_likelihoods(model: BlockDiffusionModel, tokens: Tensor, masked: Tensor, block_size: int) -> Tensor:
    """log p of the clean token at every masked position of one document, from the plain model with a dense mask."""
    length = len(tokens)
    both = torch.cat([tokens.masked_fill(masked, MASK_ID), tokens])[None]
    mask = reference.equation_3([length], block_size)
    logits = reference.logits(
        both, reference.positions([length]).repeat(2)[None], mask, hf_weights(model.eval()), CONFIG
    )
    return logits[0, :length].log_softmax(-1).gather(1, tokens[:, None])[:, 0][masked]


def documents(samples: list[Sample]) -> list[Tensor]:
    parts = []
    for item in samples:
        for tokens, is_padding in zip(item.tokens.split(item.document_lengths), item.padding, strict=True):
            if not is_padding:
                parts.append(tokens)
    return parts


def test_block_size_1_is_the_exact_likelihood_of_the_unshifted_model(model: BlockDiffusionModel) -> None:
    """Token k is predicted at its own position from MASK there and the clean tokens before it."""
    result = evaluate(model, SAMPLES, block_sizes=[1], batch_size=3)["block_sizes"]["1"]
    terms = []
    for tokens in documents(SAMPLES):
        for k in range(len(tokens)):
            prefix = torch.cat([tokens[:k], torch.tensor([MASK_ID])])[None]
            causal = torch.ones(k + 1, k + 1, dtype=torch.bool).tril()
            logits = reference.logits(prefix, torch.arange(k + 1)[None], causal, hf_weights(model), CONFIG)
            terms.append(-float(logits[0, k].log_softmax(-1)[tokens[k]]))
    assert len(terms) == 53
    assert result["nll_bound"] == pytest.approx(sum(terms) / 53, rel=1e-6)
    assert result["ce_masked"] == result["nll_bound"]
    assert {entry["ce_masked"] for entry in result["by_noise"].values()} == {result["ce_masked"]}
    assert len(result["by_noise"]) == 8 and {entry["tokens"] for entry in result["by_noise"].values()} == {53}


def test_ar_loss_is_the_shifted_causal_cross_entropy(model: BlockDiffusionModel) -> None:
    terms: list[float] = []
    for tokens in documents(SAMPLES):
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        logits = reference.logits(tokens[None], torch.arange(len(tokens))[None], causal, hf_weights(model), CONFIG)
        terms += (-logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])).flatten().tolist()
    result = evaluate(model, SAMPLES, block_sizes=[])
    assert result["ar_nll"] == pytest.approx(sum(terms) / len(terms), rel=1e-6) and result["block_sizes"] == {}


@pytest.mark.parametrize("block_size", [2, 3, 5])
def test_the_estimate_agrees_with_enumeration_of_all_masks(model: BlockDiffusionModel, block_size: int) -> None:
    """E over t and masks of sum CE / t: the integral of t^(n-1) (1-t)^(L-n) over (0, 1] is B(n, L-n+1) for a mask of n
    tokens. Mean of 800 independent estimates; |z| < 4 fails by chance once in 16,000 runs, and the seeds are fixed."""
    tokens = random_ids(CONFIG, 5, seed=11)[0]
    length = len(tokens)
    exact = 0.0
    for bits in itertools.product([False, True], repeat=length):
        masked = torch.tensor(bits)
        n = int(masked.sum())
        if n:
            beta = math.gamma(n) * math.gamma(length - n + 1) / math.gamma(length + 1)
            exact -= beta * float(log_likelihoods(model, tokens, masked, block_size).sum())
    exact /= length
    single = Sample(tokens, [length], [False], torch.ones(length, dtype=torch.bool), 0)
    batches = [
        evaluate(model, [single], block_sizes=[block_size], draws=20, seed=seed)["block_sizes"][str(block_size)]
        for seed in range(40)
    ]
    bounds = torch.tensor([batch["nll_bound"] for batch in batches], dtype=torch.float64)
    z = float((bounds.mean() - exact) / (bounds.std() / len(bounds) ** 0.5))
    assert abs(z) < 4.0, (float(bounds.mean()), exact)
    assert float(bounds.std() / len(bounds) ** 0.5) < 0.05 * exact, "too noisy to show a wrong weight"


def test_masked_cross_entropy_and_accuracy_are_over_masked_tokens(model: BlockDiffusionModel) -> None:
    class Recorder(ModelScorer):
        batches: list[tuple[Batch, RowScores]] = []  # noqa: RUF012

        def score(self, batch: Batch) -> RowScores:
            scores = super().score(batch)
            self.batches.append((batch, scores))
            return scores

    recorder = Recorder(model)
    result = evaluate(recorder, SAMPLES, block_sizes=[4], draws=3, noise_levels=4, batch_size=2)["block_sizes"]["4"]
    rows = [pair for pair in recorder.batches if pair[0].layout != "ar"]
    ce = torch.cat([scores.cross_entropy_R for _, scores in rows])
    correct = torch.cat([scores.correct_R for _, scores in rows]).double()
    t = torch.cat([batch.noise_levels_R[: batch.num_rows] for batch, _ in rows]).double()
    assert len(ce) == sum(batch.num_rows for batch, _ in rows)
    assert result["ce_masked"] == pytest.approx(float(ce.mean()))
    assert result["accuracy"] == pytest.approx(float(correct.mean()))
    assert result["nll_bound"] == pytest.approx(float((ce / t).sum()) / (53 * 3))
    for level in range(4):
        inside = (t > level / 4) & (t <= (level + 1) / 4)
        entry = result["by_noise"][level_name(level, 4)]
        assert entry["tokens"] == int(inside.sum()) > 0
        assert entry["ce_masked"] == pytest.approx(float(ce[inside].mean()))
    assert sum(entry["tokens"] for entry in result["by_noise"].values()) == len(ce)


def assert_same(left: dict, right: dict) -> None:
    assert left["ar_nll"] == pytest.approx(right["ar_nll"], rel=1e-9)
    for size, values in left["block_sizes"].items():
        for name in ("ce_masked", "nll_bound", "accuracy"):
            assert values[name] == pytest.approx(right["block_sizes"][size][name], rel=1e-9), (size, name)
        assert values["by_noise"].keys() == right["block_sizes"][size]["by_noise"].keys()


def test_the_batch_size_changes_nothing(model: BlockDiffusionModel) -> None:
    whole = evaluate(model, SAMPLES, block_sizes=[1, 4], draws=2, batch_size=4)
    for batch_size in (1, 3):
        assert_same(evaluate(model, SAMPLES, block_sizes=[1, 4], draws=2, batch_size=batch_size), whole)


def test_clean_tokens_that_nobody_needs_change_nothing(model: BlockDiffusionModel) -> None:
    needed, everything = (
        evaluate(model, SAMPLES, block_sizes=[1, 4, 16], clean_tokens=which) for which in ("needed", "all")
    )
    assert_same(everything, needed)


def test_ranks_share_the_windows(model: BlockDiffusionModel) -> None:
    """Each rank adds its sums; what the other ranks add is what they computed before."""
    sums: list[list[Tensor]] = [[], []]

    def record(rank: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: (sums[rank].append(tensor.clone()), tensor)[1]

    for rank in range(2):
        evaluate(model, SAMPLES, block_sizes=[1, 4], shard=(rank, 2), reduce=record(rank))
    other = iter(sums[1])
    both = evaluate(model, SAMPLES, block_sizes=[1, 4], shard=(0, 2), reduce=lambda tensor: tensor + next(other))
    assert_same(both, evaluate(model, SAMPLES, block_sizes=[1, 4]))


def test_loaded_models_and_models_in_training_give_the_same(model: BlockDiffusionModel) -> None:
    model.train()
    result = evaluate(model, SAMPLES, block_sizes=[4])
    assert model.training
    assert evaluate(LoadedModel(model, None), SAMPLES, block_sizes=[4]) == result
    assert evaluate(model, SAMPLES, block_sizes=[4], seed=1) != result


def test_the_models_tokens_do_not_depend_on_the_sample_index(model: BlockDiffusionModel) -> None:
    """The position in the list is the key of the noise, so windows keep their masks whatever index they carry."""
    moved = [Sample(s.tokens, s.document_lengths, s.padding, s.supervised, s.sample_index + 50) for s in SAMPLES]
    assert evaluate(model, moved, block_sizes=[4]) == evaluate(model, SAMPLES, block_sizes=[4])


@pytest.mark.parametrize(("num_windows", "draws"), [(1, 1), (64, 1), (7, 5), (1, 100)])
def test_levels_are_stratified(num_windows: int, draws: int) -> None:
    levels = stratified_levels(num_windows, draws, seed=3)
    assert levels.shape == (num_windows, draws) and float(levels.min()) > 0.0 and float(levels.max()) <= 1.0
    part = (levels.double() * num_windows * draws).ceil().long() - 1
    assert sorted(part.flatten().tolist()) == list(range(num_windows * draws))
    row_part = (levels.double() * draws).ceil().long() - 1
    for row in row_part:
        assert sorted(row.tolist()) == list(range(draws))


def test_windows_get_levels_in_no_order() -> None:
    levels = stratified_levels(64, 1, seed=0)[:, 0]
    correlation = torch.corrcoef(torch.stack([levels, torch.arange(64.0)]))[0, 1]
    assert abs(float(correlation)) < 0.3 and not torch.equal(levels, stratified_levels(64, 1, seed=1)[:, 0])


def test_progress_counts_forward_passes(model: BlockDiffusionModel) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        model,
        SAMPLES,
        block_sizes=[1, 4],
        draws=2,
        batch_size=3,
        on_pass=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(index, 8) for index in range(1, 9)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"block_sizes": [0]}, "block_sizes=0"),
        ({"draws": 0}, "draws=0"),
        ({"noise_levels": 0}, "noise_levels=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard": (0, 3)}, "4 held-out windows do not split over 3"),
        ({"samples": []}, "no held-out windows"),
        ({"block_origin": "middle"}, "block_origin=middle"),
        ({"clean_tokens": "some"}, "clean_tokens=some"),
    ],
)
def test_what_cannot_be_evaluated_is_named(model: BlockDiffusionModel, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        evaluate(model, **({"samples": SAMPLES, "block_sizes": [4]} | options))


def test_a_model_without_mask_has_only_its_ar_loss() -> None:
    plain = build_model(ModelConfig(architecture="llama", vocab_size=150), dtype=torch.float64)
    assert evaluate(plain, SAMPLES, block_sizes=[])["ar_nll"] > 0.0
    with pytest.raises(ConfigError, match="no MASK token"):
        evaluate(plain, SAMPLES, block_sizes=[4])
