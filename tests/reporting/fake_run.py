"""Write run directories that look like real ones: the quickstart's curriculum, or a tiny MoE's."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

TOKENS_PER_STEP = 1024
PROMPT = "A list comprehension in Python"
TEXT = (" is a short way to build a list:", " it applies an expression to every item of an iterable,")


def stage_configs(block_sizes: list[int], steps: int) -> list[dict[str, Any]]:
    """Stages of equal length, as the resolved configuration lists them."""
    tokens = steps * TOKENS_PER_STEP // len(block_sizes)
    return [
        {"name": f"block_{size}", "block_size": size, "tokens": tokens, "lr": {"shape": "constant", "peak": 1.0}}
        for size in block_sizes
    ]


def config(name: str, block_sizes: list[int], steps: int, *, moe: bool = False) -> dict[str, Any]:
    """A resolved configuration; the model has SmolLM2-135M's shape, or a tiny Ling-style one."""
    smollm = {
        "architecture": "llama", "num_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_query_groups": 3,
        "head_dim": 64, "ffn_hidden_size": 1536, "vocab_size": 49153, "tie_embeddings": True, "rope_theta": 100000.0,
        "moe": {"num_experts": 0},
    }  # fmt: skip
    ling = {
        "architecture": "llada2_moe", "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4,
        "num_query_groups": 2, "head_dim": 32, "ffn_hidden_size": 384, "vocab_size": 4096, "tie_embeddings": False,
        "qk_norm": True, "rotary_percent": 0.5,
        "moe": {"num_experts": 16, "top_k": 4, "num_groups": 4, "group_top_k": 2, "expert_ffn_hidden_size": 64,
                "shared_expert_ffn_hidden_size": 64, "first_dense_layers": 1},
    }  # fmt: skip
    return {
        "run": {"name": name, "dir": f"runs/{name}"},
        "seed": 1234,
        "model": ling if moe else smollm,
        "data": {
            "sequence_length": 128,
            "document_alignment": 32,
            "block_origin": "document",
            "clean_tokens": "needed",
        },
        "parallel": {"tp": 1, "pp": 1, "cp": 1, "ep": 1},
        "curriculum": {"stages": stage_configs(block_sizes, steps)},
        "objective": {"weighting": "elbo", "schedule": "linear", "t_min": 0.0, "t_max": 1.0, "level": "sequence"},
        "optimizer": {"lr": 1.0e-4, "min_lr": 1.0e-6, "beta1": 0.9, "beta2": 0.95, "clip_grad": 1.0},
        "trainer": {"max_steps": None, "global_batch_size": 8, "micro_batch_size": 2, "dtype": "float32"},
        "logging": {"wandb": False, "tensorboard": False},
    }


def training_rows(block_sizes: list[int], steps: int, *, moe: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """One row a step: the loss falls, jumps when the block grows and falls again."""
    rng = random.Random(seed)
    rows = []
    per_stage = max(steps // len(block_sizes), 1)
    for step in range(1, steps + 1):
        stage = min((step - 1) // per_stage, len(block_sizes) - 1)
        size = block_sizes[stage]
        inside = step - stage * per_stage
        settled = 3.4 + 0.72 * math.log2(size + 1) * 0.9
        cross_entropy = settled + 2.1 * math.exp(-inside / 6) * (1.3 if stage == 0 else 0.8) + rng.gauss(0, 0.22)
        ratio = min(max((step * 0.618034) % 1.0 * 0.9 + 0.05 + rng.gauss(0, 0.02), 0.02), 0.99)
        row: dict[str, Any] = {
            "step": step, "stage": stage, "block_size": size, "layout": "bdlm",
            "consumed_samples": step * 8, "consumed_tokens": step * TOKENS_PER_STEP,
            "loss": cross_entropy * (1 + rng.gauss(0, 0.06)) * 1.04, "ce_masked": cross_entropy, "mask_ratio": ratio,
            "grad_norm": 6.5 * math.exp(-inside / 5) + 1.6 + abs(rng.gauss(0, 0.35)),
            "lr": 1e-4 * min(step / 6, 1.0, 0.1 + 0.9 * (steps - step) / (0.2 * steps)),
            "tokens_per_s": 178 + rng.gauss(0, 6), "positions_per_s": 330 + rng.gauss(0, 10),
            "tflops_per_device": 0.26, "mfu": None, "memory_gib": 2.9 + 0.002 * step, "applied": True,
            "time_share": {"data": 0.02, "forward": 0.3, "backward": 0.55, "other": 0.13},
            "embedding_noise_std": 0.1356 * max(1 - step / 25, 0.0), "mask_embedding_rms": 0.09 + 0.0002 * step,
            "ce_by_noise": {f"{level / 8:g}-{(level + 1) / 8:g}": cross_entropy * (0.8 + 0.05 * level)
                            for level in (step % 8, (step + 5) % 8)},
        }  # fmt: skip
        if moe:
            row["expert_load_max_over_mean"] = 1.35 + 2.2 * math.exp(-step / 14) + abs(rng.gauss(0, 0.08))
            row["dead_experts"] = max(round(3 * math.exp(-step / 8) - 0.4), 0)
        rows.append(row)
    return rows


def evaluation(progress: float) -> dict[str, Any]:
    """An evaluation JSON; ``progress`` 0 is the AR model, 1 the converted one."""

    def between(before: float, after: float) -> float:
        return after + (before - after) * math.exp(-3.5 * progress) if progress < 1 else after

    blocks: dict[str, Any] = {}
    for size, (before, after) in {1: (6.13, 3.77), 4: (7.92, 4.96), 8: (9.15, 5.83)}.items():
        ce = between(before, after)
        levels = {f"{i / 4:.2f}-{(i + 1) / 4:.2f}": round(ce * (0.72 + 0.15 * i), 4) for i in range(4)}
        blocks[str(size)] = {
            "ce_masked": round(ce, 4), "nll_bound": round(ce * 0.985, 4),
            "accuracy": round(0.34 * math.exp(-(ce - 3.7) / 2.2), 4), "by_noise": levels,
        }  # fmt: skip
    return {"ar_nll": round(between(3.152, 3.118), 4), "block_sizes": blocks}


def validation_row(step: int, progress: float) -> dict[str, Any]:
    """The evaluation at ``progress`` as a row of metrics.jsonl."""
    result = evaluation(progress)
    row: dict[str, Any] = {"step": step, "valid/ar_nll": result["ar_nll"]}
    for size, values in result["block_sizes"].items():
        row.update({f"valid/block_{size}/{key}": value for key, value in values.items()})
    return row


def sample(block_size: int = 8, seed: int = 3) -> dict[str, Any]:
    """A denoising trajectory: the tokens of ``TEXT``, filled in over several steps a block."""
    rng = random.Random(seed)
    words = [token for part in TEXT for token in _tokens(part)]
    steps: list[list[str | None]] = []
    for start in range(0, len(words), block_size):
        block = words[start : start + block_size]
        state: list[str | None] = [None] * len(block)
        steps.append(list(state))
        order = rng.sample(range(len(block)), len(block))
        while order:
            for position in [order.pop() for _ in range(min(len(order), rng.choice([1, 1, 2, 3])))]:
                state[position] = block[position]
            steps.append(list(state))
    passes = sum(any(token is not None for token in step) for step in steps)
    return {
        "prompt": PROMPT, "text": "".join(words), "block_size": block_size, "steps": steps,
        "forward_passes": passes, "threshold": 0.95, "temperature": 0.0, "seed": 0,
    }  # fmt: skip


def _tokens(text: str) -> list[str]:
    return [" " + word for word in text.split()]


def write_rows(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Write (not append) metrics.jsonl."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_fake_run(
    run_dir: Path,
    *,
    block_sizes: tuple[int, ...] = (1, 4, 8),
    steps: int = 60,
    moe: bool = False,
    finished: bool = True,
) -> Path:
    """A whole run: configuration, metrics with validation and, when ``finished``, evaluations, summary and sample."""
    sizes = list(block_sizes)
    logged = steps if finished else steps * 4 // 7
    rows: list[dict[str, Any]] = [validation_row(0, 0.0)]
    for row in training_rows(sizes, steps, moe=moe)[:logged]:
        rows.append(row)
        if row["step"] % max(steps // 6, 1) == 0:
            rows.append(validation_row(row["step"], row["step"] / steps))
    write_rows(run_dir, rows)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config(run_dir.name, sizes, steps, moe=moe), sort_keys=False))
    if finished:
        before, after = evaluation(0.0), evaluation(1.0)
        write_json(run_dir / "eval_before.json", before)
        write_json(run_dir / "eval_after.json", after)
        write_json(run_dir / "sample.json", sample(sizes[-1]))
        summary = {
            "block8_ce_before": 9.15, "block8_ce_after": 5.83, "block1_ce_before": 6.13, "block1_ce_after": 3.77,
            "ar_nll_before": 3.152, "ar_nll_after": 3.118, "train_seconds": 327.4, "total_seconds": 402.9,
            "peak_memory_gib": 3.41, "checkpoint": "runs/quickstart/checkpoints/step_00000060",
        }  # fmt: skip
        write_json(run_dir / "summary.json", summary)
    return run_dir
