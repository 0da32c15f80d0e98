"""What a machine is taken for: with and without CUDA, with libraries that are there, broken or missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.parallel import capabilities
from llada_mega.parallel.capabilities import APEX, TE, choose_gradient_fusion, choose_implementation, choose_software

Machine = Callable[..., None]
find_spec = importlib.util.find_spec


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Pretends a machine: ``machine(cuda, module=source, ...)`` with packages that have these sources."""

    def pretend(cuda: bool, **sources: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(capabilities, "_hidden", {})
        for name in (TE, f"{TE}.pytorch", APEX, "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name, source in sources.items():
            parts = name.split("__")
            (tmp_path / parts[0]).mkdir(exist_ok=True)
            (tmp_path / parts[0] / "__init__.py").touch()
            (tmp_path / "/".join(parts) / "__init__.py").parent.mkdir(exist_ok=True)
            (tmp_path / "/".join(parts) / "__init__.py").write_text(source)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        absent = [name for name in (TE, APEX) if not any(source.startswith(name) for source in sources)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
        capabilities.obstacle.cache_clear()

    yield pretend
    capabilities.obstacle.cache_clear()


def test_auto_takes_transformer_engine_where_it_works(machine: Machine) -> None:
    machine(True, transformer_engine__pytorch="")
    assert choose_implementation("auto").name == "te"
    assert choose_implementation("te").name == "te"
    assert choose_implementation("local").name == "local"
    assert choose_implementation("auto", torch.float64).name == "local"


@pytest.mark.parametrize(
    ("cuda", "sources", "reason"),
    [
        (True, {}, "it is not installed"),
        (False, {"transformer_engine__pytorch": ""}, "there is no CUDA device"),
        (
            True,
            {"transformer_engine__pytorch": "raise RuntimeError('cudnn shared object not found.')"},
            r"importing it fails \(RuntimeError: cudnn shared object not found\.\)",
        ),
        (True, {"transformer_engine": ""}, r"importing it fails \(ModuleNotFoundError"),
    ],
    ids=["not installed", "no CUDA", "broken", "without its PyTorch part"],
)
def test_without_it_auto_is_local_and_te_an_error(
    machine: Machine, cuda: bool, sources: dict[str, str], reason: str
) -> None:
    machine(cuda, **sources)
    choice = choose_implementation("auto")
    assert choice.name == "local"
    with pytest.raises(ConfigError, match=f"model.implementation=te needs TransformerEngine, and {reason}") as caught:
        choose_implementation("te")
    assert "\n" not in str(caught.value)
    assert str(caught.value).split(", and ")[1].split("; use")[0] in choice.reason


def test_unknown_implementation() -> None:
    with pytest.raises(ConfigError, match="use auto, local or te"):
        choose_implementation("fast")


def test_what_cannot_be_used_cannot_be_imported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(False, transformer_engine__pytorch="", apex__optimizers="", amp_C="")
    for name in (TE, APEX, "amp_C", "fused_weight_gradient_mlp_cuda"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that it is put back afterwards
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    capabilities.hide_unusable()
    for name in (TE, "transformer_engine.pytorch", "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda"):
        with pytest.raises(ImportError):
            __import__(name)
    assert capabilities.obstacle(TE) == "there is no CUDA device"


def test_gradient_fusion_needs_a_kernel(machine: Machine) -> None:
    machine(True, apex__optimizers="", amp_C="")  # apex without its extension for weight gradients
    assert choose_gradient_fusion(None, "te").name == "on"
    assert choose_gradient_fusion(False, "te").name == "off"
    assert choose_gradient_fusion(None, "local").name == "off"
    with pytest.raises(ConfigError, match=r"parallel\.gradient_accumulation_fusion=true needs a kernel"):
        choose_gradient_fusion(True, "local")
    machine(True, apex__optimizers="", amp_C="", fused_weight_gradient_mlp_cuda="")
    assert choose_gradient_fusion(True, "local").name == choose_gradient_fusion(None, "local").name == "on"


def test_a_namesake_is_not_apex(machine: Machine) -> None:
    machine(True, apex="")
    assert "importing it fails" in str(capabilities.obstacle(APEX))


def test_software_of_a_run_on_this_machine() -> None:
    """Plain values: the section goes into config.yaml."""
    if torch.cuda.is_available():
        pytest.skip("for a machine without CUDA")
    software = choose_software(ModelConfig(), ParallelConfig(), torch.float32)
    assert yaml.safe_load(yaml.safe_dump(vars(software))) == vars(software)
    assert (software.implementation, software.optimizer, software.norm, software.clip) == ("local", *["torch"] * 3)
    assert software.gradient_accumulation_fusion is False
    assert software.attention_backend == "cpu"
    assert software.versions["torch"] == torch.__version__
