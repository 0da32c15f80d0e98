"""Bad input of every kind, given to the real command line over real files: one clear line, nothing trained or lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.checkpoint import list_checkpoints, verify
from llada_mega.cli import main
from llada_mega.parallel import destroy
from tests.checkpoint.tiny import IMPORTED_LLAMA, save_model, save_tokenizer

STAGES = "curriculum.stages=[{name: one, block_size: 8, tokens: 512}]"


@dataclass
class Workplace:
    """A working directory with a Hugging Face model, its checkpoint, a corpus and a finished run of two steps."""

    root: Path

    def train(self, *overrides: str) -> list[str]:
        """Arguments of a run that works, changed by ``overrides``."""
        return [
            "train",
            "run.name=new",
            "data.train=corpus",
            "data.sequence_length=64",
            "data.tokenizer=hf",
            "trainer.global_batch_size=4",
            "logging.progress=false",
            STAGES,
            *IMPORTED_LLAMA,
            *overrides,
        ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    save_model(root / "hf")
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"for i in range({i}): print(i)" * 9}) + "\n" for i in range(40))
    )
    here = Path.cwd()
    os.chdir(root)
    try:
        assert main(["data", "build", "input=text.jsonl", "tokenizer=hf", "output=corpus"]) == 0
        assert main(["convert", "import", "hf=hf", "output=checkpoint"]) == 0
        destroy()
        assert main(Workplace(root).train("run.name=run", "trainer.max_steps=1")) == 0
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    shutil.copytree(prepared, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return Workplace(tmp_path / "work")


Case = tuple[str, Callable[[Workplace], list[str]], str]


def truncate(path: Path, keep: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def corrupt_idx(work: Workplace) -> list[str]:
    (work.root / "corpus.idx").write_bytes(b"not an index at all")
    return work.train()


def truncated_bin(work: Workplace) -> list[str]:
    truncate(work.root / "corpus.bin")
    return work.train()


def empty_corpus(work: Workplace) -> list[str]:
    (work.root / "empty.jsonl").write_text("")
    return ["data", "build", "input=empty.jsonl", "tokenizer=hf", "output=nothing"]


def malformed_record(work: Workplace) -> list[str]:
    (work.root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    return ["data", "build", "input=bad.jsonl", "tokenizer=hf", "output=nothing"]


def missing_text_key(work: Workplace) -> list[str]:
    return ["data", "build", "input=text.jsonl", "tokenizer=hf", "output=nothing", "text_key=content"]


def other_tokenizer(work: Workplace) -> list[str]:
    (work.root / "other").mkdir()
    save_tokenizer(work.root / "other", 270)
    return work.train("data.tokenizer=other", "model.vocab_size=271", "model.mask_token_id=270")


def tokenizer_too_large(work: Workplace) -> list[str]:
    return work.train("model.vocab_size=201", "model.mask_token_id=200")


def truncated_initial_checkpoint(work: Workplace) -> list[str]:
    truncate(work.root / "checkpoint" / "tensors" / "part_00000.safetensors")
    return work.train("trainer.init=checkpoint")


def initial_checkpoint_without_marker(work: Workplace) -> list[str]:
    (work.root / "checkpoint" / "COMPLETE").unlink()
    return work.train("trainer.init=checkpoint")


def hf_without_a_field(work: Workplace) -> list[str]:
    path = work.root / "hf" / "config.json"
    content = json.loads(path.read_text())
    del content["rms_norm_eps"]
    path.write_text(json.dumps(content))
    return ["convert", "import", "hf=hf", "output=out"]


def hf_truncated_weights(work: Workplace) -> list[str]:
    truncate(work.root / "hf" / "model.safetensors")
    return ["convert", "import", "hf=hf", "output=out"]


def damaged_state(work: Workplace) -> list[str]:
    checkpoint = list_checkpoints(work.root / "runs" / "run" / "checkpoints")[-1]
    (checkpoint / "state.json").write_text("{")
    return work.train("run.name=run")


CASES: list[Case] = [
    ("wrong key", lambda w: w.train("trainer.max_step=3"), "did you mean trainer.max_steps?"),
    ("wrong group", lambda w: w.train("+modle=tiny"), "modle"),
    ("wrong type", lambda w: w.train("optimizer.lr=fast"), "optimizer.lr"),
    ("unknown choice", lambda w: w.train("objective.weighting=best"), "objective.weighting=best"),
    ("heads and groups", lambda w: w.train("model.num_query_groups=4"), "model.num_query_groups=4"),
    ("tensor parallel heads", lambda w: w.train("parallel.tp=4"), "parallel.tp=4"),
    (
        "block size and sequence",
        lambda w: w.train("data.block_origin=sequence", STAGES.replace("8", "24")),
        "block_size=24",
    ),
    ("alignment", lambda w: w.train("data.document_alignment=48"), "data.document_alignment=48"),
    ("batch split", lambda w: w.train("trainer.micro_batch_size=3"), "trainer.micro_batch_size=3"),
    ("no stages", lambda w: w.train("curriculum.stages=[]"), "curriculum.stages"),
    ("empty noise band", lambda w: w.train("objective.t_min=0.9", "objective.t_max=0.1"), "objective.t_min=0.9"),
    ("mask outside", lambda w: w.train("model.mask_token_id=301"), "model.mask_token_id=301"),
    ("missing corpus", lambda w: w.train("data.train=nowhere"), "there is no nowhere.bin"),
    ("corrupt idx", corrupt_idx, "corpus.idx"),
    ("truncated bin", truncated_bin, "corpus.bin"),
    ("empty corpus", empty_corpus, "holds no document"),
    ("malformed record", malformed_record, "bad.jsonl:2"),
    ("missing text key", missing_text_key, "content"),
    ("other tokenizer", other_tokenizer, "data.tokenizer"),
    ("tokenizer larger than the vocabulary", tokenizer_too_large, "model.vocab_size=201"),
    ("truncated initial checkpoint", truncated_initial_checkpoint, "checkpoint"),
    ("checkpoint without marker", initial_checkpoint_without_marker, "COMPLETE is missing"),
    (
        "initial checkpoint of another model",
        lambda w: w.train("trainer.init=checkpoint", "model.num_layers=3"),
        "model.num_layers",
    ),
    ("run directory in the way", lambda w: w.train("run.dir=text.jsonl"), "run.dir=text.jsonl cannot be written"),
    (
        "resume with another model",
        lambda w: w.train("run.name=run", "model.ffn_hidden_size=96"),
        "was 80 and is now 96",
    ),
    ("resume with another curriculum", lambda w: w.train("run.name=run", STAGES.replace("8", "4")), "block_size was 8"),
    ("resume with a damaged state", damaged_state, "state.json"),
    ("resume from nowhere", lambda w: w.train("checkpoint.resume=nowhere"), "checkpoint.resume=nowhere"),
    ("nothing held out", lambda w: w.train("trainer.validation.every=1"), "data.valid"),
    ("tokenizer missing", lambda w: w.train("data.tokenizer=runs"), "no tokenizer.json"),
    ("config.json without a field", hf_without_a_field, "rms_norm_eps"),
    ("truncated safetensors", hf_truncated_weights, "model.safetensors"),
    ("more ranks than processes", lambda w: w.train("parallel.cp=2"), "cp=2 = 2 does not divide the 1 processes"),
    ("te is not there", lambda w: w.train("model.implementation=te"), "model.implementation=te"),
    ("prompt without model", lambda w: ["generate", "checkpoint=nowhere", "prompt=x"], "nowhere"),
    ("merge of nothing", lambda w: ["merge", "nowhere", "output=out"], "nowhere holds no complete checkpoint"),
    ("merge without validation", lambda w: ["merge", "runs/run", "output=out"], "no checkpoint was made at a valid"),
    ("merge with odd weights", lambda w: ["merge", "[checkpoint]", "output=out", "weights=[1,2]"], "weights=[1, 2]"),
    ("merge with a wrong type", lambda w: ["merge", "3", "output=out"], "checkpoints=[3] must be a run or a list"),
    ("merge onto a directory in use", lambda w: ["merge", "[checkpoint]", "output=hf"], "hf exists and is not empty"),
    ("stacked what", lambda w: ["convert", "export", "checkpoint", "output=out", "experts=both"], "experts=both"),
    ("mask outside of the import", lambda w: ["convert", "import", "hf", "output=out", "mask_token_id=999"], "999"),
    ("prompt for a model without MASK", lambda w: ["generate", "hf=hf", "prompt=x"], "MASK"),
]


def contents(run: Path) -> dict[Path, bytes]:
    """Every file of a run but those that say what went wrong, and the lock."""
    says = ("exit.json", "lock")
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in says)
    return {path: path.read_bytes() for path in files if path.parent.name != "logs"}


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_ends_in_one_line(
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
    arguments: Callable[[Workplace], list[str]],
    message: str,
) -> None:
    command = arguments(workplace)
    run = workplace.root / "runs" / "run"
    before = contents(run)
    capsys.readouterr()
    try:
        status = main(command)
    finally:
        destroy()
    err = capsys.readouterr().err
    assert status == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last, err
    assert "Traceback" not in err
    assert not list(workplace.root.glob("runs/new/metrics.jsonl"))  # nothing was trained
    assert contents(run) == before  # and nothing lost
    assert not (workplace.root / "out").exists() and not (workplace.root / "nothing.idx").exists()


def test_a_full_disk_keeps_the_older_checkpoint(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> list[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write", full)
    assert main(workplace.train("run.name=run")) == 2
    err = capsys.readouterr().err
    assert "disk is full; older checkpoints are intact" in err and "Traceback" not in err
    (checkpoint,) = list_checkpoints(workplace.root / "runs" / "run" / "checkpoints")
    assert verify(checkpoint) == []
