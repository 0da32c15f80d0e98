#!/usr/bin/env bash
# Starts this node's part of a training run and waits for it: launch/torchrun.sh experiment=cpt_16b [key=value ...]
# On several nodes, start it on each, with NNODES, NODE_RANK and MASTER_ADDR set (docs/cluster.md); under Slurm by srun.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python && -z ${CONTAINER_IMAGE:-} ]] && PYTHON=$root/.venv/bin/python
fi
exec "$PYTHON" -m launch.node "$@"
