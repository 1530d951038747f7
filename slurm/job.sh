# shellcheck shell=bash
# Shared by all templates: start the run on all nodes, forward Slurm's signal, and decide what happens next. The templates source this file.
#
# Nothing here depends on your site. For its settings see site.example.sh and docs/slurm.md. These variables can be set there, or before
# sbatch (which passes the environment to the job):
#     DTL_SITE       file that is sourced first (default: slurm/site.sh if it exists): modules, virtual environment, network
#     DTL_PYTHON     Python that has dtl's packages (default: python)
#     DTL_WRAP       command before Python on every node, for example a container: `apptainer exec --nv dtl.sif`
#     DTL_PROCESSES  ranks per node (default: the job's GPUs on its first node; 1 if it has none)
#     DTL_LAUNCH     accelerate config file (default: chosen from launch/ by nodes and GPUs)
#     DTL_CACHE      folder for packed image folders and downloaded shards (default: on the node's local disk, see node.sh)
#     DTL_REQUEUE    off: exit with status 75 instead of requeueing (for jobs that you chain yourself)
#     DTL_MAX_TRIES  the job ends after this many rounds in a row without a new checkpoint (default 3)
#     DTL_DRY_RUN    off: no `dtl train --dry-run` before the first step of a new run

run_job() {  # CONFIG [--section.key VALUE ...]
  set_up
  find_run_folder "$@"
  open_notes
  count_ranks
  choose_launch_file
  choose_port
  if [[ -z $warned && $round -eq 0 && $(newest_checkpoint) == the-beginning && ${DTL_DRY_RUN:-on} != off ]]; then
    dry_run
  fi
  if [[ -z $warned ]]; then
    log "$world rank(s) on $SLURM_JOB_NODELIST, $(basename "$launch"), port $port, round $round, run folder $run"
    start_step "${train[@]}"
    wait_for_step
  fi
  decide
}

run_sweep_element() {  # CONFIG SETTINGS.txt [--section.key VALUE ...]
  [[ $# -ge 2 && -r $2 ]] || fail "usage: sbatch --array=1-N slurm/array_sweep.sbatch CONFIG SETTINGS.txt [--section.key VALUE ...]"
  local config=$1 file=$2 settings lines=() name
  shift 2
  mapfile -t lines < <(grep -v -E '^[[:space:]]*(#|$)' "$file")
  local task=${SLURM_ARRAY_TASK_ID:-0}
  [[ $task -ge 1 && $task -le ${#lines[@]} ]] || fail "$file has ${#lines[@]} settings, and this is element $task of the array: submit with --array=1-${#lines[@]}"
  # xargs reads words and quotes as the shell does, but runs nothing.
  mapfile -t settings < <(xargs -n 1 printf '%s\n' <<<"${lines[task - 1]}")
  name=$(basename "$file")
  run_job "$config" --run.dir "runs/${name%.*}" --run.name "$(element_name "$task" "${settings[@]}")" "$@" "${settings[@]}"
}

run_fold_element() {  # FOLDS CONFIG [--section.key VALUE ...]
  [[ $# -ge 2 && $1 =~ ^[1-9][0-9]{0,8}$ ]] || fail "usage: sbatch --array=1-K slurm/array_folds.sbatch K CONFIG [--section.key VALUE ...], K the number of folds"
  local folds=$1 config=$2 name fold=${SLURM_ARRAY_TASK_ID:-0}
  shift 2
  [[ $fold -ge 1 && $fold -le $folds ]] || fail "there are $folds folds, and this is element $fold of the array: submit with --array=1-$folds"
  name=$(basename "$config")
  # As dtl folds names and sets them.
  run_job "$config" --run.dir "runs/${name%.*}-folds" --run.name "fold-$fold" --data.fold.number "$fold" --data.fold.of "$folds" "$@"
}

run_search_element() {  # CONFIG --space FILE [--budget N] [--section.key VALUE ...]
  [[ $# -ge 3 && $1 != --* && " $* " == *" --space"* ]] ||
    fail "usage: sbatch --array=1-W slurm/array_search.sbatch CONFIG --space FILE [--budget N] [--section.key VALUE ...], W the number of workers"
  newest_checkpoint() { echo "history-of-$(cat "$run"/trial-*/history.jsonl 2>/dev/null | wc -c)-bytes"; }  # of all trials: has any made progress?
  set_up
  find_run_folder search --config "$@"
  open_notes
  count_ranks
  launch='' port=0 world=1 status=75  # dtl search launches its workers by itself
  if [[ -z $warned ]]; then
    log "worker ${SLURM_ARRAY_TASK_ID:-1} of ${SLURM_ARRAY_TASK_COUNT:-1}, round $round, search $run"
    start_step "${train[@]}"
    wait_for_step
  fi
  case $status in
    0) log "done: $run"; exit 0 ;;
    2) log "not requeued, the input is wrong (the log above has the error)"; exit 2 ;;
    75) requeue "stopped after saving" ;;
    *) requeue "ended with status $status" ;;
  esac
}

element_name() {  # 2 --phases.all.lr 0.03 --run.seed=1  ->  2-lr0.03-seed1
  local name=$1 word option value
  shift
  for word in "$@"; do
    if [[ $word == --* ]]; then
      option=${word%%=*} value=''
      [[ $word != *=* ]] || value=${word#*=}
      name+=-${option##*[.-]}$value
    else
      name+=$word
    fi
  done
  name=${name//[^A-Za-z0-9._-]/_}
  echo "${name:0:80}"
}

# ---- before the start

set_up() {
  # The job name for scancel and scontrol. An array element needs both numbers: the job id of the last element is that of the whole array,
  # and `scontrol requeue` of that id would start all elements again.
  job=$SLURM_JOB_ID
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  step='' sender=''
  trap on_warning USR1
  trap on_term TERM
  local site=${DTL_SITE:-$DTL_HOME/slurm/site.sh}
  if [[ -e $site ]]; then
    # shellcheck source=/dev/null
    source "$site"
  elif [[ -n ${DTL_SITE:-} ]]; then
    fail "DTL_SITE is $DTL_SITE, but there is no such file"
  fi
  export DTL_HOME DTL_PYTHON=${DTL_PYTHON:-python} DTL_WRAP=${DTL_WRAP:-}
  read -ra python <<<"$DTL_WRAP $DTL_PYTHON"
  command -v "${python[0]}" >/dev/null || fail "${python[0]} is not found on $(hostname): set DTL_PYTHON, or activate your environment in $site"
}

find_run_folder() {  # sets `train`, the trainer's arguments, and `run`, the folder that it will work in
  train=("$@")
  [[ $# -eq 0 || $1 == --* || $1 == search ]] || train=(--config "$@")
  # Errors in the config or the options are reported here, in one line, before anything starts.
  run=$("${python[@]}" "$DTL_HOME/slurm/run_folder.py" "${train[@]}") || exit $?
}

open_notes() {  # files that pass information from one round of the job to the next
  # The run folder may have been prepared by somebody else: no link in it is followed, and what the notes say is only compared.
  round=${SLURM_RESTART_COUNT:-0} notes=$run/slurm/$SLURM_JOB_ID before=$(status_print)
  local place
  for place in "$run/slurm" "$notes" "$notes/round-$round"; do
    [[ ! -L $place ]] || fail "$place is a link: dtl writes inside of the run folder only; remove it"
  done
  mkdir -p "$notes" || fail "the run folder $run cannot be written"
  if [[ $round -eq 0 || ! -e $notes/first_status ]]; then
    write_note first_status "$before"
    write_note tries "0 $(newest_checkpoint)"
  elif [[ $before != "$(read_note first_status)" ]]; then
    train+=(--run.resume auto)  # an earlier round has started the run: `--run.resume never` must not start it again
  fi
}

write_note() {  # NAME TEXT. In place of whatever has the name: it is not written through a link, or into a pipe.
  local new
  new=$(mktemp "$notes/.note-XXXXXX") || fail "$notes cannot be written"
  echo "$2" >"$new"
  mv -fT "$new" "$notes/$1" || fail "$notes/$1 cannot be written"
}

read_note() {  # NAME
  if [[ -f $notes/$1 && ! -L $notes/$1 ]]; then head -c 200 "$notes/$1" | head -n 1; fi
}

count_ranks() {
  # Count the GPUs of the job, not those of the node: GPUs of other jobs may be visible too.
  local gpus=${SLURM_GPUS_ON_NODE:-}
  [[ $gpus =~ ^[0-9]+$ ]] || gpus=$(awk -F, '{print $NF ? NF : 0}' <<<"${CUDA_VISIBLE_DEVICES:-}")
  has_gpus=$((gpus > 0))
  local processes=${DTL_PROCESSES:-$gpus}
  [[ $processes -gt 0 ]] || processes=1
  world=$((processes * SLURM_NNODES))
  # Floating-point sums depend on the number of threads, so it is fixed here, the same in every round.
  local threads=$((${SLURM_CPUS_PER_TASK:-1} / processes))
  export DTL_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
}

choose_launch_file() {
  local name
  if [[ $has_gpus -eq 0 ]]; then
    name=cpu; [[ $world -eq 1 ]] || name=cpu_2
  else
    name=gpu; [[ $world -eq 1 ]] || name=gpus; [[ $SLURM_NNODES -eq 1 ]] || name=nodes
  fi
  launch=${DTL_LAUNCH:-$DTL_HOME/launch/$name.yaml}
  [[ -r $launch || ! -r $DTL_HOME/$launch ]] || launch=$DTL_HOME/$launch
  [[ -r $launch ]] || fail "no launch file $launch: DTL_LAUNCH names an accelerate config file"
}

choose_port() {
  # Rank 0 runs on this node. Each job id has its own 16 ports, outside the range that the system uses for outgoing connections.
  # Take the first one that is free, starting at a different one in each round.
  local low high from=20000 size=10000
  read -r low high </proc/sys/net/ipv4/ip_local_port_range || { low=32768 high=60999; }
  if [[ $low -lt 30000 ]]; then
    if [[ $low -ge 12000 ]]; then from=10000 size=$((low - 10000))
    elif [[ $high -le 63000 ]]; then from=$((high + 1)) size=$((65535 - high)); fi
  fi
  local first=$((from + SLURM_JOB_ID * 16 % (size / 16 * 16))) i
  for i in {0..15}; do
    port=$((first + (i + round) % 16))
    is_listening "$port" || return 0
  done
  fail "ports $first to $((first + 15)) of $(hostname) are all in use"
}

is_listening() {  # PORT. /proc lists sockets in hex; state 0A is LISTEN.
  local hex
  printf -v hex '%04X' "$1"
  grep -qs -E "^ *[0-9]+: [0-9A-F]+:$hex [0-9A-F]+:[0-9A-F]+ 0A " /proc/net/tcp /proc/net/tcp6
}

# ---- the run

dry_run() {  # what cannot work ends the job here, and not after DTL_MAX_TRIES rounds; the cache of every node is filled
  log "dry run on $SLURM_JOB_NODELIST"
  start_step "${train[@]}" --dry-run
  wait_for_step
  case $status in
    0) ;;
    1) log "not requeued, the dry run failed (the log above has the error)"; exit 1 ;;
    2) log "not requeued, the input is wrong: see the dry run's line above"; exit 2 ;;
    *) requeue "stopped in the dry run" ;;
  esac
}

start_step() {  # --config FILE [--section.key VALUE ...]
  local host
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [[ $SLURM_NNODES -gt 1 ]] || host=127.0.0.1
  export DTL_WORLD=$world DTL_MAIN_HOST=$host DTL_MAIN_PORT=$port DTL_LAUNCH_FILE=$launch DTL_LOGS=$notes/round-$round
  # Without this, a node that rejoins a rendezvous waits for an address that is never written (torch's shared store).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it from sbatch
  unset SLURM_EXPORT_ENV  # after `sbatch --export=NONE` the tasks would otherwise have no environment
  # If one node fails, end all: the ranks of the others would wait for it. If one succeeds, do not end the others, whatever the site's WaitTime:
  # the first node may still be writing the report.
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 "$DTL_HOME/slurm/node.sh" "$@" &
  step=$!
  [[ -z $warned ]] || on_warning
}

wait_for_step() {  # sets `status`
  while :; do  # a signal to this script ends the wait, not the step
    wait "$step" && status=0 || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  [[ -z $sender ]] || kill "$sender" 2>/dev/null || true
}

on_warning() {  # Slurm's signal (--signal), sent only to this script: time limit, or preemption with a grace time
  warned=1
  [[ -n $step && -z $sender ]] || return 0
  log "received Slurm's warning signal: asking the run to save and stop"
  # Repeated, because a trainer that is still starting has no handler yet and ignores the signal (see node.sh).
  (while :; do scancel --signal=USR1 "$job" 2>/dev/null || true; sleep 5; done) &
  sender=$!
}

on_term() {  # the job ends in KillWait seconds; all its processes got the same signal, so the run is already saving
  log "received SIGTERM: Slurm is ending this round of the job"
}

# ---- afterwards

decide() {
  local state=unknown why='' after
  after=$(status_print)
  if [[ $after != "$before" ]]; then  # otherwise it was written by an earlier round
    state=$(status_field state) why=$(status_field why)
  fi
  case $state:$why in
    done:*) log "done: $run"; exit 0 ;;
    failed:input*) log "not requeued, the input is wrong: ${why#input: }"; exit 2 ;;
    failed:interrupted*) log "interrupted, not requeued"; exit 1 ;;
    stopped:*"before the first step") requeue "stopped before its first step" ;;
    stopped:*) requeue "stopped after saving" ;;
    *)
      if [[ -n $warned ]]; then requeue "stopped before it could save"; fi
      if [[ $state == failed ]]; then requeue "ended with an error${why:+: $why}"; fi
      requeue "ended without a result in status.json (state $state${why:+, $why}): it was killed, or the log above has the error" ;;
  esac
}

requeue() {  # WHY
  local tries newest last slurm_state
  newest=$(newest_checkpoint)
  read -r tries last <<<"$(read_note tries)"
  [[ $tries =~ ^[0-9]{1,4}$ ]] || tries=0  # bash's arithmetic would run a command in brackets
  if [[ $newest == "$last" ]]; then tries=$((10#$tries + 1)); else tries=0; fi
  write_note tries "$tries $newest"
  if [[ $tries -ge ${DTL_MAX_TRIES:-3} ]]; then
    log "$1; $tries rounds without a new checkpoint (DTL_MAX_TRIES), not requeued: submit the same sbatch command to resume from $newest"
    exit 1
  fi
  if [[ ${DTL_REQUEUE:-on} == off ]]; then
    log "$1; not requeued (DTL_REQUEUE is off): submit the same sbatch command to resume from $newest"
    exit 75
  fi
  # Slurm requeues a preempted job itself, and a cancelled job must not be requeued: neither is in state RUNNING any more. A job that has
  # reached its time limit is not either, but only this script requeues it.
  slurm_state=$(squeue --noheader --jobs="$job" --format='%T %r' 2>/dev/null || true)
  if [[ $slurm_state != RUNNING* && $slurm_state != *TimeLimit ]]; then
    log "$1; not requeued by this script, because Slurm reports the job as ${slurm_state:-unknown}"
    exit 75
  fi
  log "$1; requeued, to resume from $newest"
  scontrol requeue "$job" || { log "Slurm refused to requeue the job: submit the same sbatch command to resume"; exit 75; }
  exit 0
}

newest_checkpoint() {
  local names
  names=$(compgen -G "$run/checkpoints/step-*" | sed 's:.*/::' | grep -x -E 'step-[0-9]+' | sort | tail -n 1) || true
  echo "${names:-the-beginning}"
}

status_text() { if [[ -f $run/status.json ]]; then head -c 1000000 "$run/status.json" 2>/dev/null; fi; }  # not of a pipe or a device

status_print() { if [[ -f $run/status.json ]]; then status_text | cksum; else echo none; fi; }

status_field() {  # NAME. The trainer writes one key per line, so neither Python nor jq is needed here.
  status_text | sed -n -E 's/^ *"'"$1"'": "(.*)",?$/\1/p' | head -n 1 | LC_ALL=C tr -d '\000-\037\177' || true
}

log() { echo "slurm/$job $(date '+%F %T'): $*"; }

fail() {
  echo "slurm/$SLURM_JOB_ID: $*" >&2
  exit 2
}
