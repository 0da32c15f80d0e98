"""``llada-mega data build``: documents in, an indexed corpus out."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from llada_mega.commands.base import Command


@dataclass
class DataBuildOptions:
    """Keys of ``data build``."""

    input: list[str] = field(
        default_factory=lambda: MISSING
    )  # files, directories, globs: jsonl(.gz .zst), parquet, txt
    tokenizer: str = MISSING  # Hugging Face directory with tokenizer.json
    output: str = MISSING  # prefix; PREFIX.bin and PREFIX.idx are written
    text_key: str = "text"  # JSON key or parquet column that holds the text
    append_eos: bool = True  # end every document with EOS
    on_error: str = "fail"  # fail | skip malformed records
    workers: int = 1  # processes that tokenize
    progress: bool = True  # show progress on standard error
    overwrite: bool = False  # replace a different corpus at output


def run(options: DataBuildOptions) -> int:
    """Builds the corpus and prints what it holds."""
    from llada_mega.data.build import build_corpus

    report = build_corpus(
        options.input,
        options.tokenizer,
        options.output,
        text_key=options.text_key,
        append_eos=options.append_eos,
        on_error=options.on_error,
        workers=options.workers,
        progress=options.progress,
        overwrite=options.overwrite,
    )
    counts = report.counts
    print(f"{report.prefix}.bin/.idx: {counts.documents} documents, {counts.tokens} tokens")
    if report.parts_reused:
        print(f"{report.parts_reused} of {report.parts} input parts were finished before and reused")
    if counts.malformed or counts.empty:
        print(f"left out: {counts.malformed} malformed and {counts.empty} empty records")
        for example in counts.examples:
            print(f"  {example}")
    return 0


COMMAND = Command(
    name="data build",
    summary="tokenize text into an indexed corpus, keeping document boundaries",
    example="llada-mega data build input=[web.jsonl.zst,books] tokenizer=SmolLM2 output=data/corpus workers=2",
    options=DataBuildOptions,
    run=run,
)
