"""The command line: what is printed, what the exit status is, and that no mistake ends in a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llada_mega.cli import main
from llada_mega.commands import COMMANDS, train
from llada_mega.commands.base import Command
from llada_mega.config.reference import walk
from llada_mega.config.schema import Config

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty directory: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def test_the_overview_lists_every_command(run: Run) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        status, out, _ = run(*arguments)
        assert status == 0
        assert all(f"  {command.name} " in out for command in COMMANDS)


def test_the_commands_are_those_of_the_design() -> None:
    assert {command.name for command in COMMANDS} == {
        "quickstart",
        "data build",
        "convert import",
        "convert export",
        "train",
        "eval",
        "generate",
        "report",
        "mask",
        "merge",
        "plan",
        "checkpoint verify",
        "checkpoint inspect",
        "doctor",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_an_example_and_every_key(run: Run, command: Command) -> None:
    status, out, _ = run(*command.name.split(), "--help")
    assert status == 0
    assert f"usage: llada-mega {command.name}" in out
    assert f"example:\n  {command.example.splitlines()[0]}" in out
    for key in walk(command.options):
        assert key.is_section or f"  {key.path}=" in out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_compose(run: Run, command: Command) -> None:
    """Every example in ``--help`` is a command line that is understood."""
    import shlex

    for line in command.example.splitlines():
        words = shlex.split(line)
        arguments = words[words.index("llada_mega") + 1 :] if words[0] == "torchrun" else words[1:]
        assert words[0] in ("llada-mega", "torchrun")
        status, _, err = run(*arguments, "--cfg", "job")
        assert (status, err) == (0, "")


def test_cfg_prints_the_composed_configuration(run: Run) -> None:
    for flags in (["--cfg", "job"], ["--cfg=job"]):
        status, out, _ = run("train", "experiment=cpt_16b", "parallel.ep=4", *flags)
        assert status == 0
        config = yaml.safe_load(out)
        assert config["parallel"]["ep"] == 4
        assert config["model"]["num_layers"] == 20


def test_a_bare_path_is_the_first_key(run: Run) -> None:
    one = yaml.safe_load(run("report", "runs/a b", "--cfg", "job")[1])
    assert one == {"runs": ["runs/a b"], "output": None}
    several = run("report", "runs/a b", "runs/it's", "output=x.html", "runs,c", "--cfg", "job")[1]
    assert yaml.safe_load(several) == {"runs": ["runs/a b", "runs/it's", "runs,c"], "output": "x.html"}
    assert yaml.safe_load(run("checkpoint", "verify", "x", "--cfg", "job")[1]) == {"path": "x"}


def test_quickstart_is_an_experiment_with_a_preset(run: Run) -> None:
    assert yaml.safe_load(run("quickstart", "--cfg", "job")[1])["run"]["name"] == "quickstart"
    moe = yaml.safe_load(run("quickstart", "experiment=quickstart_moe", "trainer.max_steps=3", "--cfg", "job")[1])
    assert moe["run"]["name"] == "quickstart_moe"
    assert moe["trainer"]["max_steps"] == 3


MISTAKES = [
    (["fly"], "unknown command 'fly'; there are: quickstart, "),
    (["trian"], "unknown command 'trian'; did you mean train? There are: "),
    (["data"], "'data' is not a command by itself; there are: data build"),
    (["checkpoint"], "there are: checkpoint verify, checkpoint inspect"),
    (["train", "--fast"], "unknown flag --fast; flags are --help, --cfg job and --multirun"),
    (["train", "--cfg"], "--cfg is not supported; use --cfg job"),
    (["train", "--cfg", "hydra"], "--cfg hydra is not supported; use --cfg job"),
    (["train", "runs/x"], "cannot read 'runs/x': expected key=value"),
    (["merge", "a", "b"], "cannot read 'b': one path is enough"),
    (["report"], "runs has no value; set runs=..."),
    (["report", "runs=[]"], "runs=[] names no run"),
    (["report", "a", "output=b"], "output=b is for a comparison"),
    (["report", "nowhere", "elsewhere"], "nowhere: no such run directory"),
    (["report", "nowhere"], "nowhere"),
    (["train", "trainer.max_step=3"], "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    (["train", "data.train=nowhere"], "data.train.0.path=nowhere: there is no nowhere.bin"),
    (["train", "experiment=cpt_100b"], "parallel.tp=4 x pp=4 x cp=1 = 16 does not divide the 1 processes of this run"),
    (["train", "experiment=cpt_16b", "parallel.tp=3"], "parallel.tp=3 does not divide model.num_attention_heads=16"),
    (["train", "model=from_init"], "model=from_init takes the model from trainer.init, which is null"),
    (["train", "model=from_init", "trainer.init=nowhere"], "nowhere"),
    (["train", "--multirun", "seed=1,2", "data.train=nowhere"], "job 0 (seed=1 data.train="),
    (["eval", "data=x"], "give either checkpoint=PATH"),
    (["eval", "checkpoint=a", "hf=b", "data=x"], "give either checkpoint=PATH"),
    (["eval", "nowhere", "data=x"], "checkpoint=nowhere does not exist"),
    (["eval", ".", "data=x", "block_sizes=[256]"], "block_sizes=256 does not fit sequence_length=128"),
    (["eval", ".", "data=x", "block_sizes=[24]", "block_origin=sequence"], "block_sizes=24 does not divide"),
    (["quickstart", "launch.nproc=2"], "the quickstart runs in one process"),
    (["quickstart", "data.train=corpus"], "two training corpora"),
    (["quickstart", "run.dir=/proc/nowhere"], "run.dir=/proc/nowhere cannot be written to"),
    (["generate", "checkpoint=nowhere", "prompt=x"], "checkpoint=nowhere does not exist"),
    (["generate", "checkpoint=."], "prompt has no value; set prompt=..."),
    (["convert", "import", "hf=nowhere", "output=x"], "nowhere"),
    (["convert", "export", "nowhere", "output=x"], "nowhere"),
    (["checkpoint", "verify", "nowhere"], "nowhere"),
    (["checkpoint", "inspect", "."], "."),
    (["data", "build", "input=nowhere.jsonl", "tokenizer=nowhere", "output=x"], "nowhere"),
    (["mask", "documents=[0]"], "documents=[0]"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_end_in_one_line(run: Run, arguments: list[str], message: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_files_that_are_missing_or_in_the_way(run: Run, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").touch()
    (tmp_path / "file").touch()
    cases = {
        "data.tokenizer=.": "no tokenizer.json there",
        "trainer.init=nowhere": "trainer.init=nowhere: no such checkpoint",
        "checkpoint.resume=nowhere": "checkpoint.resume=nowhere: no such checkpoint",
        "run.dir=file/run": "run.dir=file/run cannot be written to",
        "run.dir=file": "run.dir=file cannot be written to",
    }
    for override, message in cases.items():
        status, _, err = run("train", "data.train=corpus", override)
        assert (status, message in err) == (2, True), err


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLADA_MEGA_DEBUG", "1")
    status, _, err = run("train", "nope=1")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: nope is not a key")


def test_defects_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(train, "validate", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("train")


def test_interruption_is_not_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "validate", interrupted)
    status, _, err = run("train")
    assert (status, err) == (130, "interrupted\n")


def test_multirun_numbers_the_run_directories(run: Run) -> None:
    status, out, _ = run("train", "--multirun", "run.name=sweep", "seed=1,2", "optimizer.lr=1e-4,1e-5", "--cfg", "job")
    assert status == 0
    jobs = [yaml.safe_load(text) for text in out.split("job ")[1:] for text in [text.split("\n", 1)[1]]]
    assert [job["run"]["dir"] for job in jobs] == [f"runs/sweep/{index}" for index in range(4)]
    assert [(job["seed"], job["optimizer"]["lr"]) for job in jobs] == [(1, 1e-4), (1, 1e-5), (2, 1e-4), (2, 1e-5)]


def test_multirun_keeps_names_that_are_swept(run: Run) -> None:
    _, out, _ = run("train", "-m", "run.name=a,b", "--cfg", "job")
    assert "dir: runs/${run.name}" in out
    assert "name: a\n" in out
    assert "name: b\n" in out


def test_multirun_runs_every_job_and_reports_the_failed(run: Run) -> None:
    status, out, err = run("mask", "--multirun", "documents=[8]", "block_size=2,4")
    assert (status, err) == (0, "")
    assert "job 2 of 2: documents=[8] block_size=4" in out
    status, _, err = run("report", "--multirun", "runs=x,y")
    assert status == 2
    assert err == "error: 2 of 2 jobs failed: 0, 1; their errors are above\n"


def test_multirun_and_torchrun_do_not_mix(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run("train", "--multirun", "seed=1,2")
    assert status == 2
    assert "cannot run under torchrun" in err


def test_the_module_and_the_cli_module_run() -> None:
    for module in ("llada_mega", "llada_mega.cli"):
        result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
        assert result.returncode == 0
        assert "usage: llada-mega" in result.stdout


def test_nothing_slow_is_imported_before_a_mistake_is_reported() -> None:
    """A wrong key is answered in about a second: neither torch nor Megatron-Core is loaded for it."""
    code = (
        "import sys; from llada_mega.cli import main; status = main(['train', 'experiment=cpt_16b', 'parallel.tp=3']);"
        "print(status, [name for name in ('torch', 'megatron', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2 []"
