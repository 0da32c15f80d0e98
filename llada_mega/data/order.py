"""The global sample order: sample number -> sample, a pure function of the blend, the seed and the curriculum.

Nothing is consumed and no position is kept: a run that resumes, or that splits its batches otherwise, asks for the
same numbers and gets the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from llada_mega.config.data import Corpus, DataConfig
from llada_mega.data.indexed import IndexedCorpus, open_corpus
from llada_mega.data.packing import PackedCorpus, split_documents
from llada_mega.data.sample import Sample
from llada_mega.data.tokenizer import Tokenizer
from llada_mega.diffusion.curriculum import Curriculum, ResolvedStage
from llada_mega.errors import ConfigError


class SampleStream:
    """An endless blend of packed corpora; each starts its next epoch, shuffled anew, when it runs out.

    The share of every corpus in every prefix of the stream stays within 1 + ln(C) samples of its weight, C corpora.

    Args:
        corpora: packed to the same sequence length.
        weights: positive, in samples; need not sum to 1.

    Raises:
        ConfigError: no corpus, or a weight that is not a positive number.
    """

    def __init__(self, corpora: Sequence[PackedCorpus], weights: Sequence[float]) -> None:
        if not corpora or len(corpora) != len(weights):
            raise ConfigError(f"data.train has {len(corpora)} corpora and {len(weights)} weights; give one of each")
        for corpus, weight in zip(corpora, weights, strict=True):
            if not 0 < weight < math.inf:
                raise ConfigError(f"data.train: weight {weight} of {corpus.corpus.prefix}; use a positive number")
        self.corpora = list(corpora)
        exact = [Fraction(weight) for weight in weights]
        self._shares = [exact[i] / sum(exact[i:]) for i in range(len(exact))]

    def locate(self, index: int) -> tuple[int, int]:
        """(corpus, how many samples of it come before) of the stream's sample ``index``.

        Corpus 0 takes its share of all samples, evenly spread; corpus 1 its share of what is left; and so on.
        """
        if index < 0:
            raise IndexError(f"sample {index} does not exist")
        for corpus, share in enumerate(self._shares):
            before, after = _taken(share, index), _taken(share, index + 1)
            if after > before:
                return corpus, before
            index -= before
        raise AssertionError("the last corpus takes every sample that is left")

    def sample(self, index: int, sample_index: int | None = None) -> Sample:
        """Sample ``index`` of the stream; ``sample_index`` (default: the same) is its number in the run."""
        which, number = self.locate(index)
        corpus = self.corpora[which]
        epoch, within = divmod(number, corpus.num_samples)
        return corpus.sample(epoch, within, index if sample_index is None else sample_index)

    __getitem__ = sample


def _taken(share: Fraction, index: int) -> int:
    """How many of the first ``index`` samples a corpus takes: share * index, rounded half up, exactly."""
    return (2 * share.numerator * index + share.denominator) // (2 * share.denominator)


class CurriculumSamples:
    """Samples of a whole run: stage by stage, each from the stream of its blend and sequence length.

    Stages that share both go on in one stream where the earlier stage stopped.

    Args:
        curriculum: resolved stages.
        streams: one for every (``stage.corpora``, ``stage.sequence_length``).
    """

    def __init__(self, curriculum: Curriculum, streams: dict[tuple[int, int], SampleStream]) -> None:
        self.curriculum, self.streams = curriculum, streams
        self._offsets: list[int] = []
        used: dict[tuple[int, int], int] = {}
        for stage in curriculum.stages:
            self._offsets.append(used.get(_stream_key(stage), 0) - stage.start_sample)
            used[_stream_key(stage)] = used.get(_stream_key(stage), 0) + stage.num_samples

    def __getitem__(self, sample_index: int) -> Sample:
        stage = self.curriculum.stage_at(sample_index)
        stream = self.streams[_stream_key(stage)]
        return stream.sample(sample_index + self._offsets[stage.index], sample_index)


class RunCorpora:
    """Opens what a configuration names, each corpus once, and keeps held-out documents apart.

    Args:
        config: the ``data`` group.
        seed: the run's seed; with it, train and held-out documents are split.
        tokenizer, vocab_size: what the corpora must fit, when given.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
    ) -> None:
        self.config, self.seed, self.tokenizer, self.vocab_size = config, seed, tokenizer, vocab_size
        self._opened: dict[str, IndexedCorpus] = {}

    def open(self, path: str) -> IndexedCorpus:
        """The corpus at ``path``.

        Raises:
            DataError: it is missing, damaged or does not fit.
        """
        if path not in self._opened:
            self._opened[path] = open_corpus(path, tokenizer=self.tokenizer, vocab_size=self.vocab_size)
        return self._opened[path]

    def stream(self, blend: Sequence[tuple[str, float]], sequence_length: int) -> SampleStream:
        """The train documents of a blend of (path, weight), packed to ``sequence_length``."""
        fraction = 0.0 if self.config.valid else self.config.valid_fraction
        packed = []
        for path, _ in blend:
            corpus = self.open(path)
            train, _ = split_documents(len(corpus), fraction, self.seed)
            packed.append(PackedCorpus(corpus, sequence_length, self.config.document_alignment, self.seed, train))
        return SampleStream(packed, [weight for _, weight in blend])

    def training_samples(self, curriculum: Curriculum) -> CurriculumSamples:
        """Every sample of the run.

        Raises:
            ConfigError: ``data.train`` is empty though a stage needs it.
            DataError: a corpus cannot be used.
        """
        blends = [blend or _as_blend(self.config.train) for blend in curriculum.corpora]
        keys = dict.fromkeys(_stream_key(stage) for stage in curriculum.stages)
        if any(not blends[corpora] for corpora, _ in keys):
            raise ConfigError("data.train is empty; give corpora as data.train=[{path: PREFIX}]")
        return CurriculumSamples(curriculum, {key: self.stream(blends[key[0]], key[1]) for key in keys})

    def held_out(self) -> list[tuple[IndexedCorpus, list[int]]]:
        """Held-out documents by corpus: all of ``data.valid``, else ``valid_fraction`` of every train corpus."""
        if self.config.valid:
            return [(corpus, list(range(len(corpus)))) for corpus in (self.open(c.path) for c in self.config.valid)]
        if self.config.valid_fraction == 0.0:
            return []
        corpora = [self.open(c.path) for c in self.config.train]
        return [(c, split_documents(len(c), self.config.valid_fraction, self.seed)[1].tolist()) for c in corpora]


def _as_blend(corpora: Sequence[Corpus]) -> list[tuple[str, float]]:
    return [(corpus.path, corpus.weight) for corpus in corpora]


def _stream_key(stage: ResolvedStage) -> tuple[int, int]:
    return stage.corpora, stage.sequence_length
