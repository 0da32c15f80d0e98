#!/usr/bin/env bash
# Makes the environment of `make te-check`: TransformerEngine with its PyTorch extension, on a machine without a GPU.
#   environment.sh PYTHON DIRECTORY
# The extension is compiled (22 CPU-minutes) against the CUDA libraries that come with PyTorch; it needs a C++ compiler
# and the headers of a CUDA toolkit (CUDA_HOME, default /usr/local/cuda). Run again, it compiles nothing that is there.
set -euo pipefail

python=$1
directory=$2
toolkit=${CUDA_HOME:-/usr/local/cuda}
version=2.20.2

if [ ! -e "$toolkit/include/cuda_runtime.h" ] && [ ! -x "$toolkit/bin/nvcc" ]; then
	echo "error: no CUDA toolkit at $toolkit; install one or set CUDA_HOME=/path/to/cuda" >&2
	exit 2
fi

"$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip install --quiet --constraint constraints.txt)
"${pip[@]}" torch
"${pip[@]}" --editable '.[dev]'
"${pip[@]}" wheel ninja cmake pybind11 einops onnx onnxscript pydantic importlib-metadata
"${pip[@]}" --no-deps "transformer-engine==$version" "transformer-engine-cu13==$version"

wheels=$("$directory/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
CPATH=$(find "$wheels" -maxdepth 2 -name include -type d -printf '%p:')
export CPATH CUDA_HOME=$toolkit NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-2}
"${pip[@]}" --no-deps --no-build-isolation "transformer-engine-torch==$version"

# the other line of Megatron-Core, which this project runs on Python 3.11
"$directory/bin/python" -m pip install --quiet --no-deps --upgrade --target "$directory/megatron-core-0.16" megatron-core==0.16.1
touch "$directory/.installed"
