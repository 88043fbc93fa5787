#!/usr/bin/env bash
# Runs a recipe of scripts/ in the SLURM job that this is called from: launch.sh RECIPE [FLAG ...]
#
# One task a GPU; main.py takes its rank and where to meet the others from SLURM's variables. The wrappers beside this
# file ask for what their recipe needs; partition, account and the like are the cluster's: sbatch --partition=... FILE.
set -euo pipefail
recipe=${1:?give the name of a recipe in scripts/, e.g. r50_e12_4gpu}
shift

# One failed task ends all, which would wait for it otherwise. srun does not take over sbatch's CPUs per task by itself.
export LAUNCH="srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} python"
export NODES=${SLURM_NNODES:-1} # for recipes whose batch depends on it
[[ -z ${SLURM_NTASKS_PER_NODE:-} ]] || export GPUS_PER_NODE=$SLURM_NTASKS_PER_NODE
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/$recipe.sh" "$@"
