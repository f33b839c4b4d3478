#!/usr/bin/env bash
# Runs on one or more Cloud TPU slices: creates the slices of config.launch unless they exist, copies this repository to
# every worker, installs it, starts the run on all of them, follows it and fetches the logs.
#
#   TPU=my-run ZONE=us-west4-a BUCKET=my-bucket \
#     launch/tpu_vm.sh configs/NAME.py --workdir=/mnt/runs/my-run [flags of msd_jax.main]
#
# DRY_RUN=1 prints the commands instead. The run goes on when this script or its machine ends; the same command follows
# it again. After a preemption the same command recreates the slices and resumes from the last checkpoint. When the run
# ends the slices remain; the script prints the command to delete them. Its exit code is that of the run.
set -euo pipefail
((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] >= 44)) ||
  { echo "error: bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2 && exit 1; }
cd "$(dirname "$0")/.."

CONFIG=${1:?the config file comes first: launch/tpu_vm.sh configs/NAME.py --workdir=/mnt/runs/NAME}
TPU=${TPU:?set TPU to a name for the slice}
ZONE=${ZONE:?set ZONE to the zone of your quota, such as us-west4-a}
BUCKET=${BUCKET:-}          # Cloud Storage bucket, mounted at /mnt/runs on every worker; needed unless --workdir=gs://...
CAPACITY=${CAPACITY:-}      # spot, reserved, reservation=NAME or flex-start=DURATION, such as flex-start=4h
CREATE=${CREATE:-}          # further flags of `queued-resources create`
SSH_FLAGS=${SSH_FLAGS:-}    # of `tpu-vm ssh` and `scp`, such as "--tunnel-through-iap --ssh-key-file=KEY"
ENV_FILE=${ENV_FILE:-}      # NAME=VALUE lines for the run (HF_TOKEN, a judge's key, LIBTPU_INIT_ARGS); mode 600
LOGS=${LOGS:-runs/$TPU}     # where the workers' logs are copied to
PYTHON=${PYTHON:-python}    # on this machine, with msd_jax installed
MODULE=${MODULE:-msd_jax.main} # msd_jax.check measures devices and network instead
# Before anything else on a worker. The TPU runtime of v5e and newer starts faster with huge pages.
PREPARE=${PREPARE:-'echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null'}
# How a worker installs the copied repository. The images' own Python may be older than 3.11.
INSTALL=${INSTALL:-'python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --clear --python 3.12 .venv &&
  ~/.local/bin/uv pip install -q --python .venv/bin/python -e ".[tpu,stores]"'}
shared=/mnt/runs # what all workers see
[[ -z ${MOUNT:-} ]] || shared=/
# How a worker mounts BUCKET. gcsfuse has a repository of its own; a fresh machine is still updating itself, and apt-get
# fails while it does. Checkpoints and models are directories that are renamed once complete. On TPU machines gcsfuse
# would remember files' metadata for ever, and not see what other workers write.
MOUNT=${MOUNT:-"mountpoint -q /mnt/runs || {
  key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  command -v gcsfuse >/dev/null || { curl -fsS \$packages/doc/apt-key.gpg | sudo tee \$key >/dev/null &&
    echo deb [signed-by=\$key] \$packages gcsfuse-\$(lsb_release -cs) main |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    for _ in {1..60}; do sudo apt-get -qy update && sudo apt-get -qy install gcsfuse && break; sleep 10; done; } &&
  sudo mkdir -p /mnt/runs && sudo chown \$USER /mnt/runs &&
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    $BUCKET /mnt/runs; }"}
shift

fail() {
  echo "error: $1" >&2
  exit 1
}

[[ -f ${CONFIG%%:*} && $CONFIG != /* ]] ||
  fail "$CONFIG: give a path inside this repository, which is what the workers get"
below=()
[[ $MODULE != msd_jax.main || -z $BUCKET ]] || below=(--below="$shared")
facts=$("$PYTHON" -m msd_jax.topology --want=tpu --config="$CONFIG" "${below[@]}" "$@")
eval "$facts" # SLICES, HOSTS, ACCELERATOR_TYPE, RUNTIME_VERSION
[[ -n $ACCELERATOR_TYPE ]] ||
  fail "$CONFIG: TPUs of this generation are Compute Engine instances, not TPU VMs; use launch/gke_jobset.sh"
[[ -n $BUCKET || " $*" == *" --workdir=gs://"* ]] || ((HOSTS * SLICES == 1)) ||
  fail "set BUCKET: $((HOSTS * SLICES)) hosts need a shared --workdir, in it or gs://..."
[[ -z $ENV_FILE || -n $(find "$ENV_FILE" -perm 600) ]] ||
  fail "ENV_FILE=$ENV_FILE: it holds secrets, so that nobody else may read it: chmod 600 $ENV_FILE"
tpus=(gcloud compute tpus)
case $CAPACITY in
  "") capacity=() ;;
  spot | reserved) capacity=("--$CAPACITY") ;;
  reservation=?*) tpus=(gcloud alpha compute tpus) capacity=("--$CAPACITY") ;;
  flex-start=?*)
    tpus=(gcloud alpha compute tpus) capacity=(--provisioning-model=flex-start "--max-run-duration=${CAPACITY#*=}")
    ;;
  *) fail "CAPACITY=$CAPACITY: choose spot, reserved, reservation=NAME or flex-start=DURATION, or leave it empty" ;;
esac

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
  run "${tpus[@]}" queued-resources create "$TPU" "${names[@]}" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "${capacity[@]}" $CREATE
fi
until [[ -n ${DRY_RUN:-} || $(state) == ACTIVE ]]; do
  [[ ! $(state) =~ ^(SUSPEND|FAIL) ]] || fail "the queued resource $TPU is in state $(state)"
  echo "waiting for $TPU: $(state)" >&2
  sleep "${SECONDS_BETWEEN_LOOKS:-30}"
done

# shellcheck disable=SC2206  # SSH_FLAGS is several flags
connection=(--zone="$ZONE" $SSH_FLAGS)
on_all() { # runs a command on all workers of all slices at once
  local pids=() status=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${connection[@]}" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}
to_all() { # copies a file into the home of every worker
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${connection[@]}" --worker=all
  done
}
on_first() { # runs a command on the worker with process 0
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${connection[@]}" --worker=0 --command="$1"
}

# The lock is held as long as a run is on the chips; run.status then has its exit code.
is_running='if [ -e msd_jax/run.lock ] && ! flock --nonblock msd_jax/run.lock true; then echo running; fi'
if [[ -z ${DRY_RUN:-} && $(on_first "$is_running") == *running* ]]; then
  echo "a run is in progress on $TPU: following it" >&2
else
  archive=$(mktemp)
  trap 'rm -f "$archive"' EXIT
  run tar -czf "$archive" --exclude-vcs --exclude=./runs --exclude=.venv --exclude=__pycache__ .
  to_all "$archive" msd_jax.tgz
  [[ -z $ENV_FILE ]] || to_all "$ENV_FILE" msd_jax.env # sourced below, never shown
  on_all "$PREPARE"
  on_all "mkdir -p msd_jax && tar -xzf msd_jax.tgz -C msd_jax && cd msd_jax && $INSTALL"
  [[ -z $BUCKET ]] || on_all "$MOUNT"
  main="{ [ ! -e ../msd_jax.env ] || { chmod 600 ../msd_jax.env && set -a && . ../msd_jax.env && set +a; }; } &&
    export JAX_PLATFORMS=\${JAX_PLATFORMS:-tpu,cpu} ${BUCKET:+JAX_COMPILATION_CACHE_DIR=/mnt/runs/.jax-cache} &&
    .venv/bin/python -u -m ${MODULE@Q} --config=${CONFIG@Q} ${*@Q}"
  # In a session of its own, it survives the end of this connection. JAX finds the other workers by the pod's metadata.
  detached="exec 9>run.lock && flock --timeout 30 9 || { echo 75 >run.status; exit; }; $main; echo \$? >run.status"
  on_all "cd msd_jax && rm -f run.status && { setsid --fork bash -c ${detached@Q} </dev/null >run.log 2>&1; }"
fi

# shellcheck disable=SC2016  # expanded on the worker
ended='for _ in $(seq 120); do [ ! -e msd_jax/run.status ] || exit 0; sleep 1; done; exit 1'
if [[ -z ${DRY_RUN:-} ]]; then
  lines=+1 status=
  until [[ $status =~ ^[0-9]+$ ]]; do
    # Until the run ends, or the connection.
    on_first "tail --lines=$lines --follow msd_jax/run.log & flock msd_jax/run.lock sleep 1; kill \$!" || true
    status=$(on_first "cat msd_jax/run.status" 2>/dev/null | tr -dc '[:digit:]' || true)
    lines=0
    if [[ -z $status && $(state) != ACTIVE ]]; then
      echo "error: $TPU is in state $(state): run the same command again to resume" >&2
      exit 42 # as if a process of the run were lost
    fi
    [[ -n $status ]] || sleep "${SECONDS_BETWEEN_LOOKS:-30}"
  done
fi
on_all "$ended" || echo "a worker has not ended within two minutes of the first" >&2

mkdir -p "$LOGS"
for node in "${nodes[@]}"; do
  for ((worker = 0; worker < HOSTS; worker++)); do
    run gcloud compute tpus tpu-vm scp "$node:msd_jax/run.log" "$LOGS/$node-$worker.log" "${connection[@]}" \
      --worker="$worker" || echo "no log from $node, worker $worker" >&2
  done
done
echo "logs: $LOGS; to delete the slice: gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force" >&2
exit "${status:-0}"
