"""A whole optimizer step on one GPU at the shapes of the published models, ``python -m bench.gpu_step``.

The models are what one rank of eight in expert parallelism has of Ling-mini (16B) and Ling-flash (100B): all widths and
the vocabulary are theirs, an eighth of the experts, few layers. A rank's experts get as many tokens as in the whole
model, since eight ranks bring them; only the exchange is missing. Text is random, masks cover half of it. Rows are
printed as they come, so that what failed does not take away what succeeded; ``--output`` writes them as JSON.

MFU is model FLOPs (``llada_mega/training/flops.py``) over the device's peak in bfloat16, with FP8 too. Memory is the
allocator's peak from the start, beside what ``llada-mega plan`` says for the same model and batch.

Without a GPU it ends with one line; ``--tiny`` runs the same program with a small model on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llada_mega.config.compose import compose
from llada_mega.config.count import total_parameters
from llada_mega.config.fp8 import RECIPES
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.context import length_multiple, logit_row_multiple
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.parallel import destroy, initialize
from llada_mega.parallel.capabilities import TE, choose_software, obstacle
from llada_mega.planning.options import PlanOptions
from llada_mega.planning.plan import Planner, prepare
from llada_mega.training.peak import peak_flops
from llada_mega.training.run import build_step

GIB = 2**30
OUTPUT = Path("build/bench/gpu_step.json")
MODELS = {
    "16B": ("model=ling_mini", "model.num_layers=5", "model.moe.num_experts=32"),
    "100B": ("model=ling_flash", "model.num_layers=3", "model.moe.num_experts=32"),
}
TINY = {"tiny": ("model=tiny_ling",)}
SHAPES = ((4096, 32), (4096, 1), (4096, 4096), (8192, 32))  # tokens of a sample, block size; one block: no clean half
TINY_SHAPES = ((64, 8), (64, 64))


@dataclass(frozen=True)
class Case:
    """One row of the table, still to be measured."""

    model: str
    overrides: tuple[str, ...]
    implementation: str  # local | te
    fp8: str | None
    length: int
    block_size: int
    dtype: str = "bfloat16"
    micro_batches: int = 2  # of one sample each

    @property
    def layout(self) -> str:
        """Two halves, or one where a block is the whole sample."""
        return "mdlm" if self.block_size == self.length else "bdlm"

    def composed(self, schema: type) -> Config:
        """The run's configuration, or ``PlanOptions`` with it inside."""
        stage = f"{{name: bench, block_size: {self.block_size}, tokens: {self.micro_batches * self.length}}}"
        return compose(
            schema,
            [
                *self.overrides,
                f"model.implementation={self.implementation}",
                f"data.sequence_length={self.length}",
                "data.train=[{path: random}]",
                f"curriculum.stages=[{stage}]",
                f"trainer.dtype={self.dtype}",
                f"trainer.fp8={self.fp8 or 'null'}",
                f"trainer.global_batch_size={self.micro_batches}",
                "parallel.recompute=selective",
                "parallel.recompute_modules=[core_attn]",
            ],
        )


@dataclass(frozen=True)
class Row:
    """What was measured, medians over steps, or why it was not."""

    model: str
    parameters: int
    implementation: str
    precision: str
    length: int
    block_size: int
    positions: int | None = None  # of a micro-batch
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    planned_gib: float | None = None
    failure: str | None = None


def cases(tiny: bool) -> Iterator[Case]:
    """The table from top to bottom: what needs least libraries comes first."""
    if tiny:
        for length, block_size in TINY_SHAPES:
            yield Case("tiny", TINY["tiny"], "local", None, length, block_size, dtype="float32")
        return
    here = torch.cuda.get_device_capability()
    recipes = [name for name, recipe in RECIPES.items() if name != "delayed" and recipe.lowest <= here < recipe.below]
    for implementation, fp8 in [("local", None), ("te", None), *(("te", recipe) for recipe in recipes)]:
        for model, overrides in MODELS.items():
            for length, block_size in SHAPES if fp8 is None else SHAPES[:1]:
                yield Case(model, overrides, implementation, fp8, length, block_size)


def measure(case: Case, repeats: int) -> Row:
    """Build the model, take two steps that are not counted and ``repeats`` that are."""
    config = case.composed(Config)
    validate(config, world_size=1)
    row = Row(
        case.model,
        total_parameters(config.model),
        case.implementation,
        case.fp8 or case.dtype,
        case.length,
        case.block_size,
        planned_gib=planned_gib(case),
    )
    if case.implementation == "te" and (reason := obstacle(TE)) is not None:
        return dataclasses.replace(row, failure=f"TransformerEngine cannot be used: {reason}")
    try:
        return _measure(row, case, config, repeats)
    except Exception as error:  # a kernel that does not work must not take the other rows away
        first_line = (str(error).splitlines() or [""])[0]
        return dataclasses.replace(row, failure=f"{type(error).__name__}: {first_line}"[:200])
    finally:
        destroy()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(row: Row, case: Case, config: Config, repeats: int) -> Row:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    dtype = getattr(torch, case.dtype)
    software = choose_software(config.model, config.parallel, dtype)
    groups = initialize(config.parallel, seed=config.seed)
    step = build_step(config, groups, None, software, random_weights=True)
    batches = make_batches(case, config, groups.device)
    seconds, flops = [], 0.0
    for _ in range(2 + repeats):
        start = time.perf_counter()
        measured, _ = step(batches, learning_rate=1e-5, embedding_noise_std=0.0, accept=lambda measured: True)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        flops = measured.flops
    taken, peak = statistics.median(seconds[2:]), peak_flops(case.dtype)
    return dataclasses.replace(
        row,
        positions=len(batches[0].input_ids_S),
        step_seconds=taken,
        tokens_per_second=case.micro_batches * case.length / taken,
        tflops=flops / taken / 1e12,
        mfu=flops / taken / peak if peak else None,
        peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
    )


def make_batches(case: Case, config: Config, device: torch.device) -> list[Batch]:
    """Random tokens, one document a sample, about half of them masked; the same for every implementation."""
    generator, schedule = torch.Generator().manual_seed(0), LinearSchedule()
    batches = []
    for index in range(case.micro_batches):
        tokens_L = torch.randint(config.model.vocab_size - 512, (case.length,), generator=generator)  # below MASK
        supervised_L = torch.ones(case.length, dtype=torch.bool)
        assert config.model.mask_token_id is not None
        batches.append(
            build_batch(
                [Sample(tokens_L, [case.length], [False], supervised_L, sample_index=index)],
                layout=case.layout,
                block_size=case.block_size,
                objective=DiffusionObjective("elbo", schedule),
                schedule=schedule,
                seed=config.seed,
                mask_token_id=config.model.mask_token_id,
                pad_token_id=config.model.pad_token_id or 0,
                t_min=0.45,
                t_max=0.55,
                length_multiple=length_multiple(config.parallel, device),
                row_multiple=logit_row_multiple(config.parallel, device),
            )
        )
    return batches


def planned_gib(case: Case) -> float:
    """The peak that ``llada-mega plan`` has for this model and batch on one device."""
    options = case.composed(PlanOptions)
    assert isinstance(options, PlanOptions)
    options.gpus = 1
    prepare(options)
    (rank,) = Planner(options).memory(options.parallel, options.trainer.micro_batch_size, gpus=1)
    return rank.total_gib


HEADER = (
    "| model | layers | products | tokens | block | ms a step | tokens/s | TFLOP/s | MFU | peak GiB | planned GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    what = f"| {row.model} | {row.implementation} | {row.precision} | {row.length} | {row.block_size} |"
    if row.failure is not None or row.step_seconds is None:
        return f"{what} {row.failure} | | | | | {_cell(row.planned_gib, '.1f')} |"
    return (
        f"{what} {1e3 * row.step_seconds:.1f} | {_cell(row.tokens_per_second, ',.0f')} | {_cell(row.tflops, '.1f')} | "
        f"{_cell(row.mfu, '.1%')} | {_cell(row.peak_gib, '.1f')} | {_cell(row.planned_gib, '.1f')} |"
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 when a row was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=8, help="steps that count")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("error: bench.gpu_step needs a CUDA device; --tiny runs its program on the CPU", file=sys.stderr)
        return 2
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(f"{device}, PyTorch {torch.__version__}\n\n{HEADER}")
    rows = []
    for case in cases(options.tiny):
        rows.append(measure(case, options.repeats))
        print(line(rows[-1]), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if any(row.failure is None for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
