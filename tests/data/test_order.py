from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_mega.config.data import Corpus, DataConfig
from llada_mega.config.training import ObjectiveConfig, StageConfig
from llada_mega.data.indexed import IndexedCorpus
from llada_mega.data.order import RunCorpora, SampleStream
from llada_mega.data.packing import PackedCorpus, split_documents
from llada_mega.diffusion.curriculum import Curriculum, build_curriculum
from llada_mega.errors import ConfigError, DataError

WriteCorpus = Callable[..., IndexedCorpus]


class FakeCorpus:
    """Just enough of a packed corpus to blend."""

    corpus = type("Corpus", (), {"prefix": "fake"})
    num_samples = 10


def blend(weights: list[float]) -> SampleStream:
    return SampleStream([FakeCorpus() for _ in weights], weights)  # type: ignore[misc]


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_every_prefix_keeps_the_weights(weights: list[float]) -> None:
    stream = blend(weights)
    total = sum(map(Fraction, weights))
    counts: Counter[int] = Counter()
    for index in range(300):
        corpus, number = stream.locate(index)
        assert number == counts[corpus]  # each corpus is read without gap or repetition
        counts[corpus] += 1
        for which, weight in enumerate(weights):
            ideal = Fraction(weight) / total * (index + 1)
            assert abs(counts[which] - ideal) <= 1 + math.log(len(weights))


def test_blend_far_out_is_exact() -> None:
    stream = blend([0.7, 0.2, 0.1])
    far = 10**15
    seen = Counter(stream.locate(far + i)[0] for i in range(1000))
    assert abs(seen[0] - 700) <= 3 and abs(seen[1] - 200) <= 3 and abs(seen[2] - 100) <= 3
    assert abs(stream.locate(far)[1] - far * [0.7, 0.2, 0.1][stream.locate(far)[0]]) <= 3


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight"):
        blend([1.0, weight])
    with pytest.raises(ConfigError, match="0 corpora"):
        SampleStream([], [])
    with pytest.raises(IndexError):
        blend([1.0]).locate(-1)


def test_a_sample_is_a_pure_function_of_its_index(write_corpus: WriteCorpus) -> None:
    def stream() -> SampleStream:
        corpora = [write_corpus([30, 9, 4, 20, 16, 7] * 3, "a"), write_corpus([12, 40] * 4, "b")]
        return SampleStream([PackedCorpus(corpus, 16, 4, seed=1) for corpus in corpora], [3.0, 1.0])

    forward = [stream()[i] for i in range(60)]
    backward = stream()
    for index in reversed(range(60)):
        sample = backward[index]
        assert sample.sample_index == index
        assert sample.tokens.tolist() == forward[index].tokens.tolist()
        assert sample.document_lengths == forward[index].document_lengths
    assert stream().sample(5, sample_index=99).sample_index == 99


def test_epochs_follow_each_other_shuffled_anew(write_corpus: WriteCorpus) -> None:
    packed = PackedCorpus(write_corpus([16, 9, 4, 20, 16, 7] * 5), 16, 4, seed=1)
    stream = SampleStream([packed], [1.0])
    epochs = [
        [tuple(stream[e * packed.num_samples + i].tokens.tolist()) for i in range(packed.num_samples)] for e in range(3)
    ]
    tokens = [sorted(token for sample in epoch for token in sample) for epoch in epochs]
    assert tokens[0] == tokens[1] == tokens[2]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def curriculum_of(stages: list[StageConfig], sequence_length: int = 16) -> Curriculum:
    return build_curriculum(
        stages,
        sequence_length=sequence_length,
        global_batch_size=4,
        base_lr=1e-3,
        min_lr=0.0,
        default_objective=ObjectiveConfig(),
    )


def test_stages_with_other_data_read_their_own_stream(write_corpus: WriteCorpus) -> None:
    a, b = write_corpus([16] * 50, "a"), write_corpus([16] * 40, "b")
    tokens = 8 * 16
    own = [Corpus(str(b.prefix), 1.0)]
    stages = [
        StageConfig(block_size=4, tokens=tokens),
        StageConfig(block_size=4, tokens=tokens, data=own),
        StageConfig(block_size=8, tokens=tokens),
        StageConfig(block_size=8, tokens=tokens, data=own),
        StageConfig(block_size=8, tokens=tokens, sequence_length=32),
    ]
    config = DataConfig(sequence_length=16, train=[Corpus(str(a.prefix))], document_alignment=4)
    samples = RunCorpora(config, seed=0).training_samples(curriculum_of(stages))
    run = [samples[i] for i in range(44)]
    assert [sample.sample_index for sample in run] == list(range(44))
    assert [len(sample) for sample in run] == [16] * 32 + [32] * 12
    streams = [SampleStream([PackedCorpus(corpus, 16, 4, seed=0)], [1.0]) for corpus in (a, b)]
    for first, stream, offset in ((0, 0, 0), (8, 1, 0), (16, 0, 8), (24, 1, 8)):
        for i in range(8):
            assert run[first + i].tokens.tolist() == streams[stream][offset + i].tokens.tolist()
    for earlier, later in ((run[:8], run[16:24]), (run[8:16], run[24:32])):
        documents = [int(sample.tokens[0]) for sample in earlier + later]
        assert len(set(documents)) == 16  # a stage does not repeat what an earlier one has read


def test_held_out_documents_are_in_no_stream(write_corpus: WriteCorpus) -> None:
    a, b = write_corpus([16] * 50, "a"), write_corpus([16] * 30, "b")
    config = DataConfig(
        sequence_length=16,
        train=[Corpus(str(a.prefix)), Corpus(str(b.prefix))],
        valid_fraction=0.2,
        document_alignment=4,
    )
    corpora = RunCorpora(config, seed=3)
    held_out = corpora.held_out()
    assert [(c.prefix, len(ids)) for c, ids in held_out] == [(a.prefix, 10), (b.prefix, 6)]
    assert held_out[0][1] == split_documents(50, 0.2, 3)[1].tolist()
    stream = corpora.stream([(str(a.prefix), 1.0)], 16)
    assert stream.corpora[0].num_samples == 40
    trained = {int(stream[i].tokens[0]) // 1000 for i in range(40)}
    assert trained.isdisjoint(held_out[0][1]) and len(trained) == 40

    separate = DataConfig(sequence_length=16, train=config.train, valid=[Corpus(str(b.prefix))], valid_fraction=0.2)
    corpora = RunCorpora(separate, seed=3)
    assert [(c.prefix, len(ids)) for c, ids in corpora.held_out()] == [(b.prefix, 30)]
    assert RunCorpora(DataConfig(train=config.train), seed=3).held_out() == []


def test_missing_data(write_corpus: WriteCorpus) -> None:
    curriculum = curriculum_of([StageConfig(block_size=4, tokens=64)])
    with pytest.raises(ConfigError, match=r"data.train is empty"):
        RunCorpora(DataConfig(sequence_length=16), seed=0).training_samples(curriculum)
    config = DataConfig(sequence_length=16, train=[Corpus("/no/such/corpus")], document_alignment=4)
    with pytest.raises(DataError, match=r"/no/such/corpus.idx does not exist"):
        RunCorpora(config, seed=0).training_samples(curriculum)
    config.train = [Corpus(str(write_corpus([16] * 8).prefix))]
    with pytest.raises(DataError, match="outside the vocabulary of 100"):
        np.array([RunCorpora(config, seed=0, vocab_size=100).training_samples(curriculum)[i] for i in range(8)])
