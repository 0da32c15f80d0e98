"""From text to micro-batches: corpus -> indexed tokens -> packed samples -> global sample order -> batches.

Read in this order: ``build`` (text files to ``PREFIX.bin/.idx/.json``), ``indexed`` (a corpus on disk), ``packing``
(documents to samples of L tokens), ``order`` (blends, epochs, stages: sample number to sample), ``batch`` (samples to
what the model sees), ``loader`` (micro-batches of a rank, built ahead). ``windows`` cuts held-out text, ``text`` is
what every Python ships, ``tokenizer`` reads ``tokenizer.json``. ``records`` and ``encoding`` are the halves of a build,
``index_file`` is Megatron's file format, ``shuffle`` the stateless permutation below ``packing``.

Names are imported when first used: workers of a build then start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llada_mega.data.batch import Batch, build_batch
    from llada_mega.data.build import BuildReport, build_corpus
    from llada_mega.data.indexed import IndexedCorpus, open_corpus
    from llada_mega.data.loader import BatchOptions, micro_batches
    from llada_mega.data.order import CurriculumSamples, RunCorpora, SampleStream
    from llada_mega.data.packing import PackedCorpus, split_documents
    from llada_mega.data.sample import Sample
    from llada_mega.data.text import python_prose, python_sources
    from llada_mega.data.tokenizer import Tokenizer, load_tokenizer
    from llada_mega.data.windows import validation_windows

_MODULE_OF = {
    "Batch": "batch",
    "build_batch": "batch",
    "BuildReport": "build",
    "build_corpus": "build",
    "IndexedCorpus": "indexed",
    "open_corpus": "indexed",
    "BatchOptions": "loader",
    "micro_batches": "loader",
    "CurriculumSamples": "order",
    "RunCorpora": "order",
    "SampleStream": "order",
    "PackedCorpus": "packing",
    "split_documents": "packing",
    "Sample": "sample",
    "python_prose": "text",
    "python_sources": "text",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "validation_windows": "windows",
}

__all__ = [
    "Batch",
    "BatchOptions",
    "BuildReport",
    "CurriculumSamples",
    "IndexedCorpus",
    "PackedCorpus",
    "RunCorpora",
    "Sample",
    "SampleStream",
    "Tokenizer",
    "build_batch",
    "build_corpus",
    "load_tokenizer",
    "micro_batches",
    "open_corpus",
    "python_prose",
    "python_sources",
    "split_documents",
    "validation_windows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
