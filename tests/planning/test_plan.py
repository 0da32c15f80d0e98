"""llada-mega plan: what it prints and writes, what it refuses, and that its parts add up."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llada_mega.cli import main
from llada_mega.config.compose import compose
from llada_mega.config.count import total_parameters
from llada_mega.config.run import ParallelConfig
from llada_mega.planning.hardware import DEVICES
from llada_mega.planning.memory import Copies
from llada_mega.planning.options import Assumptions, PlanOptions
from llada_mega.planning.plan import Planner, make_plan, prepare
from llada_mega.planning.search import candidates, search_layouts
from llada_mega.planning.step_time import rate

SMALL = ("model=tiny_ling", "trainer.global_batch_size=16", "trainer.dtype=bfloat16", "data.sequence_length=256")


def options(*overrides: str) -> PlanOptions:
    composed = compose(PlanOptions, overrides)
    prepare(composed)
    return composed


def test_the_largest_experiment_is_planned_within_4_gib(tmp_path: Path) -> None:
    """The largest child of this process so far is not larger than what is allowed, whoever it was."""
    output = tmp_path / "plan.json"
    command = [sys.executable, "-m", "llada_mega", "plan", "experiment=cpt_100b", "gpus=256", f"output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20
    plan = json.loads(output.read_text())
    assert plan["fits"] and plan["gpus"] == 256 and plan["data_parallel"] == 16
    assert [stage["name"] for stage in plan["stages"]][:2] == ["warmup_1", "warmup_4"]
    for word in ("102.89 B parameters", "experts", "stable", "assume.expert_load", "Fits", "tp sends, GiB"):
        assert word in done.stdout
    for stage in plan["stages"]:
        assert sum(stage["seconds"].values()) == pytest.approx(stage["step_seconds"])
        assert stage["steps"] * 2048 * 4096 == stage["tokens"]
    assert sum(stage["days"] for stage in plan["stages"]) * 256 * 24 == pytest.approx(plan["gpu_hours"])
    for rank in plan["ranks"]:
        assert sum(rank["memory_gib"].values()) == pytest.approx(rank["total_gib"])


def test_without_a_number_the_fewest_devices_are_taken() -> None:
    run = options("experiment=cpt_100b", "hardware.memory_gib=64")
    plan = make_plan(run)
    assert plan.fits
    fewer = dataclasses.replace(run, gpus=plan.gpus // 2)
    assert not make_plan(fewer).fits


def test_the_fewest_devices_need_be_no_power_of_two() -> None:
    """A global batch of 48 can be dealt to 1, 2, 3, ... ranks; the optimizer's state decides how many are enough."""
    base = ("model=tiny_ling", "trainer.global_batch_size=48", "parallel.distributed_optimizer=true")
    peaks = {gpus: make_plan(options(*base, f"gpus={gpus}")).peak_gib for gpus in (2, 3)}
    assert peaks[3] < peaks[2]
    enough = 6 + (peaks[2] + peaks[3]) / 2
    assert make_plan(options(*base, f"hardware.memory_gib={enough}")).gpus == 3


def test_ranks_that_share_experts_gather_each_others_tokens() -> None:
    """Twice the routes of half the width: as much work, twice the rows of a product, and traffic even with ep=1."""
    base = ("model=tiny_ling", "gpus=4", "trainer.global_batch_size=4", "trainer.dtype=bfloat16")
    run = options(*base, "parallel.etp=2")
    one, two = (make_plan(options(*base, f"parallel.etp={etp}")).stages[0] for etp in (1, 2))
    assert "ep" not in one.sent_gib
    model, layers = run.model, run.model.num_layers - run.model.moe.first_dense_layers
    routes = model.moe.top_k * ((layers - 1) * two.positions + two.logit_rows)
    assert two.sent_gib["ep"] * 2**30 == pytest.approx(routes * 2 * (2 * 2 * model.hidden_size + 4))
    # All-gather: hidden states there and back, choices with their weights; of whole layers, forward and backward.
    gathered = make_plan(options(*base, "parallel.etp=2", "parallel.dispatcher=allgather", "data.clean_tokens=all"))
    token = 2 * 2 * 2 * model.hidden_size + model.moe.num_experts * (4 + 1 + 4)
    stage = gathered.stages[0]
    assert stage.sent_gib["ep"] * 2**30 == pytest.approx(layers * stage.positions * token)


def test_stages_without_clean_half_cost_half() -> None:
    stages = {stage.name: stage for stage in make_plan(options("experiment=cpt_16b", "gpus=64")).stages}
    assert stages["warmup_1"].positions == 2 * stages["stable"].positions == 8192
    assert stages["warmup_1"].seconds["experts"] > 1.9 * stages["stable"].seconds["experts"]
    assert stages["warmup_1"].sent_gib["dp"] == stages["stable"].sent_gib["dp"]


def test_documents_make_attention_cheaper() -> None:
    whole = make_plan(options("experiment=cpt_16b", "gpus=64")).stages[5]
    short = make_plan(options("experiment=cpt_16b", "gpus=64", "assume.document_length=512")).stages[5]
    assert short.seconds["attention"] == pytest.approx(whole.seconds["attention"] / 8, rel=0.01)
    assert short.seconds["linear"] == pytest.approx(whole.seconds["linear"])


def test_recomputation_trades_memory_for_time() -> None:
    plain = make_plan(options("experiment=cpt_16b", "gpus=64", "parallel.recompute=none"))
    full = make_plan(options("experiment=cpt_16b", "gpus=64", "parallel.recompute=full"))
    assert full.peak_gib < 0.7 * plain.peak_gib and full.days > 1.1 * plain.days


def test_hardware_and_assumptions_count() -> None:
    base = make_plan(options("experiment=cpt_16b", "gpus=64")).stages[0]
    twice = make_plan(options("experiment=cpt_16b", "gpus=64", "hardware.peak_tflops=1978")).stages[0]
    better = make_plan(options("experiment=cpt_16b", "gpus=64", "assume.expert_efficiency=0.8")).stages[0]
    assert twice.seconds["linear"] == pytest.approx(base.seconds["linear"] / 2)
    assert better.seconds["experts"] == pytest.approx(base.seconds["experts"] / 2)


def test_fp8_is_for_the_layers_alone() -> None:
    wide = make_plan(options("experiment=cpt_16b", "gpus=64")).stages[0]
    narrow = make_plan(options("experiment=cpt_16b", "gpus=64", "trainer.fp8=tensorwise")).stages[0]
    assert narrow.seconds["experts"] == pytest.approx(wide.seconds["experts"] * 989 / 1979)
    assert narrow.seconds["logits"] == wide.seconds["logits"]
    assert narrow.seconds["attention"] == wide.seconds["attention"]


def test_links_depend_on_how_far_an_axis_reaches() -> None:
    device, assume = DEVICES["h100"], Assumptions(link_efficiency=1.0)
    parallel = ParallelConfig(tp=4, sp=True, cp=2, ep=16)
    copies = Copies.of(parallel, 64)
    rates = {axis: rate(axis, parallel, copies, device, assume) / 1e9 for axis in ("tp", "cp", "ep", "dp")}
    assert (rates["tp"], rates["cp"], rates["dp"]) == (450, 450, 50)
    # Of 15 other ranks 7 are in the node.
    assert rates["ep"] == pytest.approx(1 / (8 / 15 / 50 + 7 / 15 / 450))


WIDE_EXPERTS = ("experiment=cpt_100b", "gpus=512", "parallel.tp=1", "parallel.sp=false")  # 8 layers a stage


def test_few_tokens_of_many_experts_wait_for_memory() -> None:
    """The reason for expert parallelism: the same products with an eighth of the tokens for each expert of a rank."""
    spread = make_plan(options(*WIDE_EXPERTS, "assume.expert_load=1")).stages[0]
    alone = make_plan(options(*WIDE_EXPERTS, "parallel.ep=1")).stages[0]
    assert alone.tflop == spread.tflop and alone.seconds["experts"] > 1.4 * spread.seconds["experts"]
    # Nothing but memory: bf16 weights are read forward and backward, fp32 gradients are read and written.
    slow = make_plan(options(*WIDE_EXPERTS, "parallel.ep=1", "hardware.memory_gb_per_s=10")).stages[0]
    model, micro_batches = options(*WIDE_EXPERTS).model, 2048 // 128
    weights = 8 * model.moe.num_experts * 3 * model.hidden_size * model.moe.expert_ffn_hidden_size
    seconds = micro_batches * (2 + 2 + 2 * 4) * weights / (10e9 * Assumptions().memory_efficiency)
    assert slow.seconds["experts"] == pytest.approx(seconds)


def test_an_expert_computes_whole_tiles() -> None:
    """Half a tile of 128 rows is empty on average."""
    base = (*WIDE_EXPERTS, "parallel.pp=1", "parallel.vp=null", "assume.expert_load=1", "hardware.memory_gb_per_s=1e6")
    spread, alone = (make_plan(options(*base, f"parallel.ep={ep}")).stages[0] for ep in (8, 1))
    rows = spread.positions * 8 / 256  # of an expert whose rank has the others too
    ratio = (1 + 64 / rows) / (1 + 64 / (8 * rows))
    assert alone.seconds["experts"] / spread.seconds["experts"] == pytest.approx(ratio)


def test_gradients_hide_behind_the_last_micro_batches_alone() -> None:
    run = ("experiment=cpt_16b", "gpus=64", "hardware.network_gb_per_s=1")
    shown = make_plan(options(*run, "parallel.overlap=false")).stages[0].seconds
    hidden = make_plan(options(*run)).stages[0].seconds
    busy = sum(shown[term] for term in shown if term not in ("bubble", "dp", "optimizer"))
    assert shown["dp"] - hidden["dp"] == pytest.approx(busy / (1024 / 64)) and hidden["dp"] > 0.2 * shown["dp"]
    # Where one micro-batch is long enough, what is assumed.
    fast = ("experiment=cpt_16b", "gpus=64", "hardware.network_gb_per_s=10000")
    shown, hidden = (make_plan(options(*fast, f"parallel.overlap={on}")).stages[0].seconds for on in ("false", "true"))
    assert hidden["dp"] == pytest.approx(0.2 * shown["dp"])


def test_experts_are_spread_over_a_node_and_no_further() -> None:
    """As Mixtures of this size are trained: fewer ranks make grouped products small, more reach over the network."""
    layout = ("experiment=cpt_100b", "gpus=512", "parallel.tp=1", "parallel.sp=false", "parallel.cp=2")
    days = {
        ep: make_plan(options(*layout, f"parallel.pp={pp}", f"parallel.ep={ep}")).days
        for ep, pp in ((1, 16), (2, 8), (8, 8), (16, 8))
    }
    assert min(days, key=lambda ep: days[ep]) == 8


def test_a_search_lists_the_fastest_layouts_that_fit() -> None:
    run = options(*SMALL, "search=true", "gpus=8", "top=5")
    found = search_layouts(run)
    planner = Planner(run)
    plans = [planner.plan(parallel, micro, 8) for parallel, micro in candidates(run, 8, "te")]
    days = sorted(plan.days for plan in plans if plan.fits)
    assert [plan.days for plan in found.best] == pytest.approx(days[:5])
    assert found.fitting == len(days) and found.too_large == len(plans) - len(days)
    assert all(plan.fits for plan in found.best)


def test_a_search_leaves_out_what_does_not_fit() -> None:
    run = options(*SMALL, "search=true", "gpus=4", "hardware.memory_gib=6.4")
    found = search_layouts(run)
    assert found.too_large > 0
    assert all(plan.peak_gib <= 6.4 - run.assume.reserved_gib for plan in found.best)


def test_a_model_of_any_size_is_planned_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=tiny", "gpus=2"]) == 0
    assert "Fits" in capsys.readouterr().out


def test_the_parameters_of_all_ranks_are_the_model(tmp_path: Path) -> None:
    plan = make_plan(options("experiment=cpt_100b", "gpus=256"))
    model = compose(PlanOptions, ["experiment=cpt_100b"]).model
    assert plan.model["parameters"] == total_parameters(model)
    held = sum(rank.parameters for rank in plan.ranks)
    # Four tensor-parallel ranks share the dense part, eight ranks the experts.
    assert held * 4 < total_parameters(model) < held * 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware.device=h1000"], "hardware.device=h1000"),
        (["hardware.memory_gib=-1"], "hardware.memory_gib=-1"),
        (["search=true"], "gpus=512"),
        (["experiment=cpt_100b", "gpus=24"], "24"),
        (["experiment=cpt_100b", "parallel.tp=3"], "parallel.tp=3"),
        (["assume.nonsense=1"], "nonsense"),
    ],
)
def test_bad_input_ends_in_one_line(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error:") and error.count("\n") == 1
