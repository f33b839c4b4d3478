#!/usr/bin/env bash
# Runs on one or more Cloud TPU slices: creates the slices of config.launch unless they exist, copies this repository to
# every worker, installs it, runs it on all of them and fetches their logs.
#
#   TPU=my-run ZONE=us-west4-a BUCKET=my-bucket \
#     launch/tpu_vm.sh configs/NAME.py --workdir=/mnt/runs/my-run [flags of msd_jax.main]
#
# DRY_RUN=1 prints the commands instead. After a preemption, run the same command again: it recreates the slices and
# resumes from the last checkpoint. When the run ends the slices remain; the script prints the command to delete them.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${1:?the config file comes first: launch/tpu_vm.sh configs/NAME.py --workdir=/mnt/runs/NAME}
TPU=${TPU:?set TPU to a name for the slice}
ZONE=${ZONE:?set ZONE to the zone of your quota, such as us-west4-a}
BUCKET=${BUCKET:-}          # Cloud Storage bucket, mounted at /mnt/runs on every worker; required for several hosts
CREATE=${CREATE:-}          # further flags of `queued-resources create`, such as "--spot" or "--reserved"
LOGS=${LOGS:-runs/$TPU}     # where the workers' logs are copied to
PYTHON=${PYTHON:-python}    # on this machine, with msd_jax installed
# How a worker installs the copied repository. The images' own Python may be older than 3.11.
INSTALL=${INSTALL:-'python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --clear --python 3.12 .venv &&
  ~/.local/bin/uv pip install -q --python .venv/bin/python -e ".[tpu]"'}
# How a worker mounts BUCKET. Checkpoints and models are directories that are renamed once complete.
MOUNT=${MOUNT:-"mountpoint -q /mnt/runs || { sudo apt-get install -qy gcsfuse && sudo mkdir -p /mnt/runs &&
  sudo chown \$USER /mnt/runs && gcsfuse --implicit-dirs --rename-dir-limit=100000 $BUCKET /mnt/runs; }"}
shift

if [[ ! -f ${CONFIG%%:*} || $CONFIG == /* ]]; then
  echo "error: $CONFIG: give a path inside this repository, which is what the workers get" >&2
  exit 1
fi
facts=$("$PYTHON" -m msd_jax.topology --want=tpu --config="$CONFIG" "$@")
eval "$facts" # SLICES, HOSTS, ACCELERATOR_TYPE, RUNTIME_VERSION
if [[ -z $ACCELERATOR_TYPE ]]; then
  echo "error: $CONFIG: gcloud offers no TPU VMs of this generation; use launch/gke_jobset.sh" >&2
  exit 1
fi
if [[ -z $BUCKET ]] && ((HOSTS * SLICES > 1)); then
  echo "error: set BUCKET: $((HOSTS * SLICES)) hosts need a shared --workdir" >&2
  exit 1
fi

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    echo "${*@Q}"
  else
    echo "+ ${*@Q}" >&2
    "$@"
  fi
}

# Each slice is a node; all are one queued resource, so that they are created and deleted together.
nodes=("$TPU")
names=(--node-id="$TPU")
if ((SLICES > 1)); then
  mapfile -t nodes < <(seq -f "$TPU-%.0f" 0 $((SLICES - 1)))
  names=(--node-prefix="$TPU" --node-count="$SLICES")
fi
state() {
  gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format='value(state.state)' 2>/dev/null ||
    echo ABSENT
}
found=ABSENT
[[ -n ${DRY_RUN:-} ]] || found=$(state)
if [[ $found =~ ^(SUSPEND|FAIL) ]]; then # the state after a preemption
  run gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
  found=ABSENT
fi
if [[ $found == ABSENT ]]; then
  # shellcheck disable=SC2086  # CREATE is several flags
  run gcloud compute tpus queued-resources create "$TPU" "${names[@]}" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" $CREATE
fi
until [[ -n ${DRY_RUN:-} || $(state) == ACTIVE ]]; do
  [[ ! $(state) =~ ^(SUSPEND|FAIL) ]] || { echo "error: the queued resource $TPU is in state $(state)" >&2; exit 1; }
  echo "waiting for $TPU: $(state)" >&2
  sleep "${SECONDS_BETWEEN_LOOKS:-30}"
done

on_all() { # runs a command on all workers of all slices at once
  local pids=() status=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" --zone="$ZONE" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

archive=$(mktemp --suffix=.tgz)
trap 'rm -f "$archive"' EXIT
run tar -czf "$archive" --exclude-vcs --exclude=./runs --exclude=.venv --exclude=__pycache__ .
for node in "${nodes[@]}"; do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:msd_jax.tgz" --zone="$ZONE" --worker=all
done
on_all "mkdir -p msd_jax && tar -xzf msd_jax.tgz -C msd_jax && cd msd_jax && $INSTALL"
[[ -z $BUCKET ]] || on_all "$MOUNT"

# The lock prevents a second run on the same chips. JAX finds the other workers by the pod's metadata.
status=0
on_all "cd msd_jax && set -o pipefail && flock --nonblock --conflict-exit-code 75 run.lock \
.venv/bin/python -u -m msd_jax.main --config=${CONFIG@Q} ${*@Q} 2>&1 | tee run.log" || status=$?

mkdir -p "$LOGS"
for node in "${nodes[@]}"; do
  for ((worker = 0; worker < HOSTS; worker++)); do
    run gcloud compute tpus tpu-vm scp "$node:msd_jax/run.log" "$LOGS/$node-$worker.log" --zone="$ZONE" \
      --worker="$worker" || echo "no log from $node, worker $worker" >&2
  done
done
echo "logs: $LOGS; to delete the slice: gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force" >&2
exit "$status"
