#!/usr/bin/env bash
# Runs a recipe of scripts/ in the SLURM job that this is called from: launch.sh RECIPE [FLAG ...]
#
# One task a GPU; main.py takes its rank and where to meet the others from SLURM's variables. The wrappers beside this
# file ask for what their recipe needs; partition, account and the like are the cluster's: sbatch --partition=... FILE.
#
# A job that is preempted, or is near its time limit (#SBATCH --signal), saves and goes back into the queue; when it runs
# again it resumes from its newest checkpoint.
set -euo pipefail
recipe=${1:?give the name of a recipe in scripts/, e.g. r50_e12_4gpu}
shift

# One failed task ends all, which would wait for it otherwise. srun does not take over sbatch's CPUs per task by itself.
export LAUNCH="srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} python"
export NODES=${SLURM_NNODES:-1} # for recipes whose batch depends on it
[[ -z ${SLURM_NTASKS_PER_NODE:-} ]] || export GPUS_PER_NODE=$SLURM_NTASKS_PER_NODE

if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && " $* " != *" --eval "* ]]; then
  flags=() resume=
  while (($#)); do
    case $1 in
      --resume) resume=${2:?--resume needs a file} && shift ;;
      --resume=*) resume=${1#*=} ;;
      --overwrite) ;; # what the job itself has written stays
      *) flags+=("$1") ;;
    esac
    shift
  done
  [[ -z $resume || $resume == auto* ]] || resume=auto:$resume # the file that was given is used if nothing is saved yet
  set -- ${flags[@]+"${flags[@]}"} --resume "${resume:-auto}"
fi

trap : TERM USR1 # the shell waits for its children, which handle them
status=0
bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/$recipe.sh" "$@" || status=$?
if [[ $status -eq 75 && -n ${SLURM_JOB_ID:-} ]]; then # PREEMPTED in training/cluster/preemption.py
  state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" 2>/dev/null || true)
  [[ $state == CANCELLED || $state == COMPLETING ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
