#!/usr/bin/env bash
# Stands for a container (DTL_WRAP) in tests of what the templates decide: instead of a launcher it runs the commands in $PRETEND,
# with the trainer's arguments as $@, and instead of a dry run those in $PRETEND_DRY_RUN. Everything else it passes on.
set -euo pipefail
if [[ ${*: -1} == --dry-run ]]; then eval "${PRETEND_DRY_RUN:-exit 0}"; fi
[[ $* == *accelerate.commands.launch* ]] || exec "$@"
while [[ $1 != */dtl/train.py ]]; do shift; done
shift
say() { mkdir -p "${run:=runs/tiny}"; printf '{\n "state": "%s",\n "why": "%s",\n "time": %s\n}\n' "$1" "${2:-}" "$(date +%s%N)" >"$run/status.json"; }
eval "$PRETEND"
