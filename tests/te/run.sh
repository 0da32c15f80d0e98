#!/usr/bin/env bash
# Runs Python in the environment of `make te-check`, where TransformerEngine finds the libraries that came with PyTorch.
#   run.sh DIRECTORY ARGUMENTS...        MEGATRON=0.16 run.sh ...: with that line of Megatron-Core
set -euo pipefail

directory=$1
python=$directory/bin/python
shift
wheels=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
LD_LIBRARY_PATH=$(find "$wheels" -maxdepth 2 -name lib -type d -printf '%p:')${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH CUDNN_HOME=$wheels/cudnn CUDA_HOME=$wheels/cu13
export PYTHONPATH=.:kernels${MEGATRON:+:$directory/megatron-core-$MEGATRON} OMP_NUM_THREADS=1
exec "$python" "$@"
