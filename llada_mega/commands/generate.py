"""``llada-mega generate``: block-diffusion decoding."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from llada_mega.commands.base import Command, model_path
from llada_mega.errors import CheckpointError


@dataclass
class GenerateOptions:
    """Keys of ``generate``."""

    checkpoint: Optional[str] = None  # checkpoint, or a run (its newest one)
    hf: Optional[str] = None  # instead: a Hugging Face directory with a MASK token
    prompt: str = MISSING
    max_new_tokens: int = 128
    block_size: int = 32  # tokens denoised together
    steps: int = 32  # denoising steps a block at most
    threshold: float = 0.95  # accept candidates more probable than this
    temperature: float = 0.0  # 0 takes the most probable token
    top_p: float = 1.0  # share of the probability to sample from
    seed: int = 0  # of the sampling
    show_steps: bool = False  # draw the denoising
    device: str = "cpu"
    dtype: str = "float32"  # float32 | bfloat16


def check(options: GenerateOptions) -> None:
    """Refuses contradictions before the model is loaded."""
    model_path(options.checkpoint, options.hf)


def run(options: GenerateOptions) -> int:
    """Prints the answer; with ``show_steps`` every denoising step before it."""
    from llada_mega.inference import load_model
    from llada_mega.inference.render import StepPrinter

    path = model_path(options.checkpoint, options.hf)
    model = load_model(path, device=options.device, dtype=options.dtype)
    if model.tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer, so a prompt cannot be read; add its tokenizer.json")
    with StepPrinter(model.tokenizer) if options.show_steps else nullcontext() as printer:
        result = model.generate(
            model.tokenizer.encode(options.prompt),
            max_new_tokens=options.max_new_tokens,
            block_size=options.block_size,
            steps=options.steps,
            threshold=options.threshold,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            on_step=printer,
        )
    print(model.tokenizer.decode(result.token_ids, skip_special_tokens=True))
    return 0


COMMAND = Command(
    name="generate",
    summary="answer a prompt by denoising it block by block",
    example='llada-mega generate checkpoint=runs/quickstart prompt="The for statement" block_size=8 show_steps=true',
    options=GenerateOptions,
    run=run,
    check=check,
)
