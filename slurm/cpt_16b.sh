#!/usr/bin/env bash
# Ling-mini-2.0 (16B) -> LLaDA2.0-mini: continual pre-training over the whole curriculum.
# sbatch slurm/cpt_16b.sh [key=value ...], from the checkout; sbatch's own options go before the script. See slurm/README.md.
#SBATCH --job-name=cpt_16b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
export LLADA_MEGA_HOME=${LLADA_MEGA_HOME:-$SLURM_SUBMIT_DIR}
EXPERIMENT=cpt_16b
# shellcheck source=slurm/job.sh
source "$LLADA_MEGA_HOME/slurm/job.sh"
