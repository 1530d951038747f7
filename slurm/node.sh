#!/usr/bin/env bash
# srun runs this once on each node (see job.sh). It starts the ranks of the node with accelerate, or a dry run.
set -euo pipefail
rank=$SLURM_NODEID

# The cache is on the node's local disk, if there is one. It may be empty in the next round.
disk=${SLURM_TMPDIR:-${TMPDIR:-}}
if [[ -z ${DTL_CACHE:-} && -n $disk && -d $disk && -w $disk ]]; then
  export DTL_CACHE=$disk/dtl-cache-$UID
fi

read -ra command <<<"$DTL_WRAP $DTL_PYTHON"
if [[ ${*: -1} == --dry-run ]]; then  # one process for all ranks of the node
  export WORLD_SIZE=$DTL_WORLD RANK=$rank LOCAL_RANK=0
elif [[ $1 == search ]]; then  # without a launcher
  export OMP_NUM_THREADS=$DTL_THREADS PYTHONPATH=$DTL_HOME${PYTHONPATH:+:$PYTHONPATH}
else
  # (`accelerate launch` is the same program, but takes seconds longer to start.)
  command+=(-m accelerate.commands.launch --config_file "$DTL_LAUNCH_FILE" --num_machines "$SLURM_NNODES" --machine_rank "$rank"
    --num_processes "$DTL_WORLD" --num_cpu_threads_per_process "$DTL_THREADS")
  if [[ $DTL_WORLD -gt 1 ]]; then
    command+=(--main_process_ip "$DTL_MAIN_HOST" --main_process_port "$DTL_MAIN_PORT")
    mkdir -p "$DTL_LOGS/node-$rank"
    command+=(--tee 3 --log_dir "$DTL_LOGS/node-$rank")  # the output of each rank goes to its own file, and to the job's log
  fi
  # Slurm has chosen the GPUs (CUDA_VISIBLE_DEVICES), so the launch file must not choose again.
  grep -q -E '^use_cpu: *true' "$DTL_LAUNCH_FILE" || command+=(--gpu_ids all)
fi
if [[ $1 == search ]]; then command+=(-m dtl "$@"); else command+=("$DTL_HOME/dtl/train.py" "$@"); fi

# Signals reach every process of the step. USR1 would end the launcher, and a trainer that has no handler yet. So it is ignored here: an ignored
# signal stays ignored across exec, until the trainer sets its own handler.
trap '' USR1
# When Slurm ends a round, it sends TERM twice. The second ends the launcher (with a single rank, the first does), while its ranks are still
# saving. This script must run until they have ended, because Slurm kills all remaining processes when it exits.
ending=''
trap 'ending=1' TERM
DTL_STEP=$SLURM_JOB_ID.$SLURM_STEP_ID "${command[@]}" &
while :; do
  wait $! && status=0 || status=$?
  kill -0 $! 2>/dev/null || break
done
while [[ -n $ending ]] && grep -qsz "^DTL_STEP=$SLURM_JOB_ID.$SLURM_STEP_ID\$" /proc/[0-9]*/environ; do sleep 0.2 || true; done
exit "$status"
