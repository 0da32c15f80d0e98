"""Reading machine code: CUBINs inside object files, and kernels that spill are found."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from aot import __main__ as aot
from aot.cubin import EM_CUDA, Kernel, embedded_cubins, find_tool, read_kernels

# Sums of products of `width` values that are all kept alive until the end.
PTX_HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry {name}(.param .u64 out) {{
.reg .f32 %f<{registers}>;
.reg .u64 %p;
ld.param.u64 %p, [out];
"""


def ptx(name: str, width: int) -> str:
    lines = [PTX_HEAD.format(name=name, registers=width + 1)]
    lines += [f"ld.volatile.global.f32 %f{i}, [%p+{4 * i}];" for i in range(width)]
    lines += ["bar.sync 0;"]
    lines += [f"st.volatile.global.f32 [%p+{4 * i}], %f{i};" for i in range(width)]
    return "\n".join([*lines, "ret;", "}"])


def elf(machine: int, body: bytes, sections: int = 2) -> bytes:
    """A 64-bit ELF file: header, body, section headers at the end."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<H", header, 18, machine)
    struct.pack_into("<QQ", header, 32, 0, 64 + len(body))
    struct.pack_into("<HHHH", header, 54, 0, 0, 64, sections)
    return bytes(header) + body + bytes(64 * sections)


def test_cubins_are_found_in_an_object_file() -> None:
    first, second = elf(EM_CUDA, b"first"), elf(EM_CUDA, b"the second \x7fEL", sections=3)
    host = elf(62, b"host code" + first + b"\x00" * 5 + second + b"tail \x7fELF")
    assert list(embedded_cubins(host)) == [first, second]
    assert list(embedded_cubins(elf(62, b"host code only"))) == []


@pytest.mark.parametrize(("width", "limit", "spills"), [(24, 64, False), (64, 32, True)])
def test_kernels_that_spill_are_found(width: int, limit: int, spills: bool, tmp_path: Path) -> None:
    try:
        ptxas, _, _ = (find_tool(name) for name in ("ptxas", "cuobjdump", "nvdisasm"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(ptx("copy", width))
    subprocess.run([ptxas, "-arch=sm_90", f"--maxrregcount={limit}", source, "-o", cubin], check=True)
    (kernel,) = read_kernels(cubin)
    assert kernel.name == "copy" and kernel.spills is spills
    assert kernel.registers <= limit and (kernel.count("local") > 0) is spills
    assert kernel.opcodes["LDG"] == kernel.opcodes["STG"] == width
    assert kernel.count("bar") == 1 and kernel.instructions >= 2 * width


def test_opcodes_are_grouped() -> None:
    opcodes = Counter(
        ["HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "LDGSTS", "UTMALDG", "UBLKCP", "SYNCS", "BAR", "LDL", "STL", "LDG"]
    )
    kernel = Kernel("k", 168, 0, 0, 0, opcodes)
    counts = {name: kernel.count(name) for name in ("mma", "tma", "cp.async", "mbarrier", "bar", "local")}
    assert counts == {"mma": 4, "tma": 2, "cp.async": 1, "mbarrier": 1, "bar": 1, "local": 2}
    assert kernel.spills and not Kernel("k", 168, 0, 0, 0, Counter({"LDG": 3})).spills
    assert Kernel("k", 168, 8, 0, 0, Counter({"LDG": 3})).spills


def test_known_local_memory_is_let_pass_and_more_is_not() -> None:
    row = {"kernel": "bwd", "spills": True, "local": 2}
    assert not aot.spills("sm_100a", row) and aot.spills("sm_90a", row)
    assert aot.spills("sm_100a", row | {"local": 3}) and aot.spills("sm_100a", row | {"kernel": "fwd"})


def test_missing_packages_are_one_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "_version", lambda package: None if package == "nvidia-cutlass-dsl" else "1")
    monkeypatch.setattr(sys, "argv", ["aot"])
    assert aot.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: not installed: nvidia-cutlass-dsl; `make kernels-aot` makes an environment"
    ]
