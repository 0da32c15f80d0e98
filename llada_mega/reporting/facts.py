"""What stands at the top of a report: model, size, progress, time, and what deserves a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llada_mega.reporting.formatting import count, duration, finite, percent, short_count, significant
from llada_mega.reporting.record import RunRecord, StageSpan


@dataclass(frozen=True)
class Fact:
    """A name, a value, and a smaller line under it."""

    name: str
    value: str
    detail: str = ""


def parameter_counts(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """(all, active per token) parameters of a model configuration, or None when a size is missing.

    Without expert biases and vocabulary padding; embeddings count in both.
    """
    try:
        hidden, vocabulary = int(model["hidden_size"]), int(model["vocab_size"])
        heads, groups, head_dim = (int(model[key]) for key in ("num_attention_heads", "num_query_groups", "head_dim"))
        layers, dense_ffn = int(model["num_layers"]), int(model["ffn_hidden_size"])
    except (KeyError, TypeError, ValueError):
        return None
    qkv = (heads + 2 * groups) * head_dim
    attention = hidden * qkv + heads * head_dim * hidden + 2 * hidden
    attention += qkv if model.get("qkv_bias") else 0
    attention += 2 * head_dim if model.get("qk_norm") else 0
    outside = vocabulary * hidden * (1 if model.get("tie_embeddings") else 2) + hidden
    moe = model.get("moe") or {}
    experts = int(moe.get("num_experts") or 0)
    dense_layers = min(int(moe.get("first_dense_layers") or 0), layers) if experts else layers
    common = outside + layers * attention + dense_layers * 3 * hidden * dense_ffn
    if not experts:
        return common, common
    expert = 3 * hidden * int(moe.get("expert_ffn_hidden_size") or 0)
    shared = 3 * hidden * int(moe.get("shared_expert_ffn_hidden_size") or 0)
    always = hidden * experts + shared
    moe_layers = layers - dense_layers
    return (
        common + moe_layers * (always + experts * expert),
        common + moe_layers * (always + int(moe.get("top_k") or 0) * expert),
    )


def planned_steps(record: RunRecord) -> int | None:
    """Optimizer steps the configuration asks for: the curriculum's, each stage rounded up to whole global batches."""
    trainer, data = record.section("trainer"), record.section("data")
    limit = trainer.get("max_steps")
    stages = record.section("curriculum").get("stages")
    batch, default_length = finite(trainer.get("global_batch_size")), finite(data.get("sequence_length"))
    total: int | None = None
    if isinstance(stages, list) and stages and batch and default_length:
        total = 0
        for stage in stages:
            length = finite(stage.get("sequence_length")) or default_length
            samples = math.ceil((finite(stage.get("tokens")) or 0) / length)
            total += math.ceil(samples / batch)
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    return total


def wall_seconds(record: RunRecord) -> tuple[float, bool] | None:
    """(seconds, measured): from summary.json, else the last row's training time, else estimated from logged rates."""
    for key in ("total_seconds", "train_seconds"):
        measured = finite(record.summary.get(key))
        if measured is not None:
            return measured, True
    trained = finite(record.training[-1].get("train_seconds")) if record.training else None
    if trained is not None:
        return trained, True
    seconds, before = 0.0, 0.0
    for row in record.training:
        tokens, rate = finite(row.get("consumed_tokens")), finite(row.get("tokens_per_s"))
        if tokens is None or not rate:
            continue
        seconds += max(tokens - before, 0.0) / rate
        before = tokens
    return (seconds, False) if seconds > 0 else None


def status(record: RunRecord) -> tuple[str, str]:
    """("finished" | "unfinished" | "empty", a line that says so)."""
    if not record.training:
        return "empty", "no step logged yet"
    last, planned = int(record.training[-1]["step"]), planned_steps(record)
    if record.summary or (planned is not None and last >= planned):
        return "finished", f"finished after {_steps(last)}"
    if planned is None:
        return "unfinished", f"{_steps(last)} so far"
    return "unfinished", f"unfinished: {count(last)} of {_steps(planned)}"


def _steps(number: int) -> str:
    return f"{count(number)} step" if number == 1 else f"{count(number)} steps"


def curriculum_line(stages: list[StageSpan]) -> str:
    """Block sizes in order, '1 → 4 → 8'; of a long curriculum the first, the largest between and the last."""
    sizes = [stage.block_size for stage in stages]
    if len(sizes) > 5:
        top = max(range(1, len(sizes) - 1), key=lambda index: sizes[index])
        left, right = " … " if top > 1 else " → ", " … " if top < len(sizes) - 2 else " → "
        return f"{sizes[0]}{left}{sizes[top]}{right}{sizes[-1]}"
    return " → ".join(map(str, sizes))


def header_facts(record: RunRecord) -> list[Fact]:
    """Model, parameters, curriculum, steps, tokens, time and memory, as far as they are known."""
    facts: list[Fact] = []
    model = record.section("model")
    if model.get("architecture"):
        shape = f"{model.get('num_layers')} layers \N{MULTIPLICATION SIGN} {model.get('hidden_size')}"
        facts.append(Fact("Model", str(model["architecture"]), shape))
    counts = parameter_counts(model)
    if counts:
        detail = f"{short_count(counts[1])} active per token" if counts[0] != counts[1] else "dense"
        facts.append(Fact("Parameters", short_count(counts[0]), detail))
    if record.stages:
        layouts = ", ".join(dict.fromkeys(stage.layout for stage in record.stages if stage.layout))
        number = len(record.stages)
        facts.append(
            Fact("Block size", curriculum_line(record.stages), f"{number} stage{'s' * (number > 1)}, {layouts}")
        )
    if record.training:
        last = record.training[-1]
        tokens = finite(last.get("consumed_tokens"))
        detail = f"{short_count(tokens)} tokens" if tokens is not None else ""
        facts.append(Fact("Steps", count(last["step"]), detail))
    wall = wall_seconds(record)
    if wall:
        train_seconds = finite(record.summary.get("train_seconds"))
        detail = "estimated from throughput"
        if wall[1]:
            detail = f"{duration(train_seconds)} of it training" if train_seconds not in (None, wall[0]) else "measured"
        facts.append(Fact("Wall time", ("" if wall[1] else "≈ ") + duration(wall[0]), detail))
    goodput = finite(record.training[-1].get("goodput")) if record.training else None
    if goodput is not None:
        facts.append(Fact("Goodput", percent(goodput), "in steps, of all time since the start"))
    memory = finite(record.summary.get("peak_memory_gib")) or max(
        (value for row in record.training if (value := finite(row.get("memory_gib"))) is not None), default=None
    )
    if memory is not None:
        dtype = str(record.section("trainer").get("dtype") or "")
        facts.append(Fact("Peak memory", f"{significant(memory, 3)} GiB", dtype))
    return facts


def findings(record: RunRecord) -> list[str]:
    """What a careful reader would point at: non-finite steps, dead experts, a MASK embedding that did not grow."""
    found: list[str] = []
    for key, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
        bad = [row["step"] for row in record.training if key in row and finite(row[key]) is None]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            found.append(f"The {what} was not finite at step {bad[0]}{more}.")
    skipped = [row["step"] for row in record.training if row.get("applied") is False]
    if skipped:
        found.append(f"{len(skipped)} of the logged steps were skipped, the first at step {skipped[0]}.")
    dead = [row for row in record.training if (finite(row.get("dead_experts")) or 0) > 0]
    if dead and record.training[-1] is dead[-1]:
        number = significant(finite(dead[-1]["dead_experts"]), 3)
        found.append(f"Experts that received no token in the last logged step: {number}.")
    if record.validation:
        first, last = (finite(row.get("valid/ar_nll")) for row in (record.validation[0], record.validation[-1]))
        if first is not None and last is not None and last - first > 0.1:
            found.append(f"The AR loss rose by {last - first:.2f} nats during training: the model forgets.")
    return found
