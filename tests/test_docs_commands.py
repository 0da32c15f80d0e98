"""Every command that the documentation shows works.

Commands on files (data, convert, eval, generate, merge, report, mask, checkpoint, doctor) are executed on tiny models
under the names that the pages use; the README's own example is executed from its first line to its last, training
included, with fewer and shorter steps. Other training runs, plans and job scripts are composed and validated as far as
that goes without starting them; `make` says what it would do. What is left is marked: ``<!-- needs: gpu -->``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zstandard

from llada_mega.cli import _find_command, _parse, main
from llada_mega.commands import COMMANDS
from llada_mega.config.compose import compose, expand_sweep
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.parallel import destroy
from tests.checkpoint.ling import save_ling
from tests.checkpoint.tiny import save_model
from tests.documented_commands import ROOT, Documented, commands_of, documented_commands

DOCUMENTED = documented_commands()
STORY = "llada-mega convert import hf=Qwen3-1.7B"  # how the README's example begins
# Long commands are only composed: the first words of their names.
COMPOSED = ("train", "quickstart", "plan")
# What makes commands of the pages short: keys that are replaced where they are given, and keys that are added.
REPLACED = {
    "data build": {"workers": "1"},
    "merge": {"k": "3"},
    "generate": {"max_new_tokens": "8"},
    "train": {"data.sequence_length": "64", "data.valid_fraction": "0.3"},
}
ADDED = {
    "eval": ["windows=4", "sequence_length=64", "noise_levels=2"],
    "generate": ["max_new_tokens=8", "block_size=8"],
    "train": [
        *("trainer.max_steps=3", "trainer.global_batch_size=2", "logging.progress=false"),
        *("trainer.validation.every=1", "trainer.validation.windows=4", "trainer.validation.noise_levels=2"),
        *("trainer.validation.block_sizes=[1,8,32]", "checkpoint.every=1", "checkpoint.keep_last=3"),
    ],
}
SHORT_STAGES = "curriculum.stages=[{name: one, block_size: 8, tokens: 512}]"


def arguments_of(command: Documented) -> list[str] | None:
    """What follows ``llada-mega``, also where torchrun starts it or a script passes it on; None for other programs."""
    words = list(command.words)
    if words[0] == "llada-mega":
        return words[1:]
    if "llada_mega" in words:
        return words[words.index("llada_mega") + 1 :]
    if words[0] == "launch/torchrun.sh":
        return ["train", *words[1:]]
    if words[0] == "sbatch":
        script = next(word for word in words[1:] if word.endswith(".sh"))
        experiment = re.search(r"^EXPERIMENT=(\w+)$", (ROOT / script).read_text("utf-8"), flags=re.MULTILINE)
        assert experiment is not None, f"{script} names no experiment"
        return ["train", f"experiment={experiment[1]}", *words[words.index(script) + 1 :]]
    return None


LLADA_MEGA = [(command, arguments) for command in DOCUMENTED if (arguments := arguments_of(command)) is not None]
OTHERS = [command for command in DOCUMENTED if arguments_of(command) is None]
STORY_BLOCK = next((c.page, c.block) for c in DOCUMENTED if shlex.join(c.words).startswith(STORY))
IN_STORY = [arguments for command, arguments in LLADA_MEGA if (command.page, command.block) == STORY_BLOCK]
# The ellipsis stands for the rest of a command that the page has explained; what follows it is composed.
EXECUTED = [
    (command, arguments)
    for command, arguments in LLADA_MEGA
    if (command.page, command.block) != STORY_BLOCK
    and not command.needs
    and arguments[0] not in COMPOSED
    and "--help" not in arguments
]


def shortened(arguments: Sequence[str]) -> list[str]:
    """The same command on less: keys replaced and added as above."""
    found, _ = _find_command(list(arguments))
    replaced = REPLACED.get(found.name, {})
    words = []
    for word in arguments:
        key = word.partition("=")[0]
        words.append(f"{key}={replaced[key]}" if key in replaced and "=" in word else word)
    keys = {word.partition("=")[0] for word in words}
    words += [word for word in ADDED.get(found.name, []) if word.partition("=")[0] not in keys]
    if found.name == "train":
        words = [SHORT_STAGES if word.startswith("curriculum=") else word for word in words]
    return words


def execute(arguments: Sequence[str]) -> None:
    """Run a command here, after taking away what it would find in its place."""
    for word in arguments:
        if word.startswith("output="):
            output = Path(word.removeprefix("output="))
            for path in output.parent.glob(f"{output.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    destroy()
    assert main(shortened(arguments)) == 0, shlex.join(arguments)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in which the names of the pages exist; the README's example makes some of them itself."""
    root = tmp_path_factory.mktemp("documented")
    text = [f'{{"text": "for i in range({i}): print(i)  # {"spam " * (i % 7)}"}}\n' for i in range(160)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_model(root / "Qwen3-1.7B", "qwen3")
        save_ling(root / "Ling-flash-2.0", mask_token_id=5)
        for directory in ("corpus", "books"):
            (root / directory).mkdir()
        (root / "corpus" / "part.jsonl.zst").write_bytes(zstandard.compress("".join(text).encode()))
        (root / "books" / "book.txt").write_text("It was a dark and stormy night. " * 40)
        (root / "held.jsonl").write_text("".join(text[:40]))
        execute(["data", "build", "input=held.jsonl", "tokenizer=Qwen3-1.7B", "output=data/held_out"])
        for arguments in IN_STORY:
            execute(arguments)
        run = root / "runs" / "qwen3"
        newest = sorted((run / "checkpoints").glob("step_*"))[-1]
        for name in ("cpt_100b", "quickstart"):
            shutil.copytree(run, root / "runs" / name, symlinks=True)
        shutil.copytree(root / "checkpoints" / "merged", root / "runs" / "cpt_100b" / "merged")
        for step in ("step_00000900", "step_00001000"):
            shutil.copytree(newest, root / "runs" / "a" / "checkpoints" / step)
        (root / "runs" / "quickstart" / "data").mkdir()
        for file in root.glob("data/held_out.*"):
            shutil.copy(file, root / "runs" / "quickstart" / "data")
        yield root
    destroy()


def test_the_readmes_example(workplace: Path) -> None:
    """Executed in the fixture; these are what its lines say that they make."""
    assert len(IN_STORY) >= 9
    assert (workplace / "runs" / "qwen3" / "report.html").is_file()
    assert (workplace / "checkpoints" / "merged" / "COMPLETE").is_file()
    assert (workplace / "qwen3-diffusion" / "config.json").is_file()


@pytest.mark.parametrize(("command", "arguments"), EXECUTED, ids=[str(command) for command, _ in EXECUTED])
def test_commands_run(
    command: Documented, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    execute(arguments)


def composed(arguments: Sequence[str]) -> None:
    """Compose a command; a training run is validated too, for the processes that it would have."""
    command, rest = _find_command(list(arguments))
    if "--help" in rest:
        assert main([*command.name.split(), "--help"]) == 0
        return
    invocation = _parse(command, [word for word in rest if word != "..."])
    jobs = expand_sweep(command.options, invocation.overrides) if invocation.multirun else [invocation.overrides]
    for overrides in jobs:
        if "..." in rest:
            overrides = [SHORT_STAGES, "data.train=data/corpus", "model=tiny_ling", *overrides]
        options = compose(command.options, overrides)
        if isinstance(options, Config) and options.model.architecture != "from_init":
            validate(options)
            if options.launch.nproc > 1:
                options.trainer.global_batch_size *= options.launch.nproc
                validate(options, world_size=options.launch.nproc)


@pytest.mark.parametrize(("command", "arguments"), LLADA_MEGA, ids=[str(command) for command, _ in LLADA_MEGA])
def test_commands_compose(
    command: Documented, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "curriculum.md").read_text("utf-8"), flags=re.DOTALL)
    assert yaml is not None
    (tmp_path / "my" / "curriculum").mkdir(parents=True)
    (tmp_path / "my" / "curriculum" / "mine.yaml").write_text(yaml[1])
    composed(arguments)


EXAMPLES = [line for command in COMMANDS for line in command.example.splitlines()]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_of_the_help_texts_compose(line: str) -> None:
    (example,) = commands_of("help", f"```sh\n{line}\n```\n")
    arguments = arguments_of(example)
    assert arguments is not None
    composed(arguments)


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_other_programs_are_known_or_marked(command: Documented) -> None:
    if command.words[0] == "make":
        assert subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, capture_output=True).returncode == 0
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for word in command.words[1:]:
            assert "=" not in word or f"$({word.partition('=')[0]}" in makefile, f"{word} sets nothing"
    elif command.words[:2] == ("git", "clone"):
        assert command.words[-3:] == ("&&", "cd", "llada-mega")
    elif not command.needs:
        pytest.fail(f"{command}: no test runs it; mark what it needs with <!-- needs: ... --> above its block")


def test_a_command_that_does_not_exist_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "```\nllada-mega train optimiser.lr=1   # comment\n```\n<!-- needs: gpu -->\n```\nNAME=1 make fast\n```\n"
    wrong, marked = commands_of("page.md", page)
    assert (wrong.words, wrong.needs) == (("llada-mega", "train", "optimiser.lr=1"), None)
    assert (marked.words, marked.needs) == (("make", "fast"), "gpu")
    with pytest.raises(Exception, match="did you mean optimizer"):
        composed(list(wrong.words[1:]))
    assert commands_of("page.md", "```\n1 2 3\n```\n") == []  # output
    with pytest.raises(ValueError, match="starts none of"):
        commands_of("page.md", "```bash\nmagic --now\n```\n")
