#!/usr/bin/env bash
# scripts/r50_pp_e12_4gpu.sh under SLURM: sbatch this file from the repository, or bash it in a shell of salloc.
#SBATCH --job-name=r50_pp_e12_4gpu
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=4
#SBATCH --time=1-00:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/launch.sh ]] || here=$SLURM_SUBMIT_DIR/scripts_slurm # sbatch runs a copy that lies elsewhere
exec bash "$here/launch.sh" r50_pp_e12_4gpu "$@"
