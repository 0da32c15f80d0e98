"""What compiled GPU code consists of: registers, memory and instructions of each kernel, read with NVIDIA's tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ELF_MAGIC = b"\x7fELF"
EM_CUDA = 190

# Opcodes of SASS by what they do. TMA moves tiles, cp.async moves vectors; SYNCS is the mbarrier, BAR the older one.
GROUPS = {
    "mma": re.compile(r"(UTC)?[A-Z]*MMA"),
    "tma": re.compile(r"UTMA(LDG|STG|REDG)|UBLK(CP|RED)"),
    "cp.async": re.compile(r"LDGSTS"),
    "mbarrier": re.compile(r"SYNCS"),
    "bar": re.compile(r"BAR"),
    "local": re.compile(r"LDL|STL"),
}
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a CUBIN.

    Attributes:
        name: its symbol.
        registers: of a thread.
        stack, local: bytes of local memory of a thread.
        shared: bytes of static shared memory; the dynamic part is set at launch and is not in a CUBIN.
        opcodes: how often each opcode occurs in the code, not how often it runs.
    """

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    opcodes: Counter[str]

    @property
    def instructions(self) -> int:
        """Number of instructions in the code."""
        return self.opcodes.total()

    def count(self, group: str) -> int:
        """Number of instructions of one of ``GROUPS``."""
        return sum(n for opcode, n in self.opcodes.items() if GROUPS[group].fullmatch(opcode))

    @property
    def spills(self) -> bool:
        """Local memory is used: registers were spilled, or an array did not fit into them. Slow either way."""
        return bool(self.stack or self.local or self.count("local"))


def embedded_cubins(data: bytes) -> Iterator[bytes]:
    """The CUBINs in an object file that carries them as plain data, in order."""
    start = data.find(ELF_MAGIC)
    while start >= 0:
        header = data[start : start + 64]
        if len(header) == 64 and struct.unpack_from("<H", header, 18)[0] == EM_CUDA:
            segments, sections = struct.unpack_from("<QQ", header, 32)
            sizes = struct.unpack_from("<HHHH", header, 54)
            end = max(segments + sizes[0] * sizes[1], sections + sizes[2] * sizes[3])
            yield data[start : start + end]
        start = data.find(ELF_MAGIC, start + 1)


def read_kernels(cubin: Path) -> list[Kernel]:
    """The kernels of a CUBIN file.

    Raises:
        FileNotFoundError: a tool is missing; see :func:`find_tool`.
        subprocess.CalledProcessError: a tool refuses the file.
    """
    resources = _output("cuobjdump", "-res-usage", str(cubin))
    pieces = _SECTION.split(_output("nvdisasm", "-c", str(cubin)))
    opcodes = {name: Counter(_INSTRUCTION.findall(code)) for name, code in zip(pieces[1::2], pieces[2::2], strict=True)}
    kernels = []
    for name, *numbers in _RESOURCES.findall(resources):
        registers, stack, shared, local = map(int, numbers)
        kernels.append(Kernel(name, registers, stack, shared, local, opcodes[name]))
    return kernels


def find_tool(name: str) -> str:
    """A binary tool of CUDA: what triton bundles, else what is on the path or in ``$CUDA_HOME``.

    Raises:
        FileNotFoundError: there is none.
    """
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends" / "nvidia" / "bin" for p in (triton and triton.submodule_search_locations) or ()]
    folders += [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError(f"{name} was not found; triton brings it (pip install triton), and so does CUDA")
    return found


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([find_tool(tool), *arguments], check=True, capture_output=True, text=True).stdout
