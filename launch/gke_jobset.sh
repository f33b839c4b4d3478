#!/usr/bin/env bash
# Runs on GKE: fills in launch/gke_tpu.yaml or launch/gke_gpu.yaml from config.launch and applies it.
#
#   NAME=my-run IMAGE=REGISTRY/msd_jax:tpu BUCKET=my-bucket \
#     launch/gke_jobset.sh configs/NAME.py --workdir=/mnt/runs/my-run [flags of msd_jax.main]
#
# DRY_RUN=1 prints the manifest instead. The cluster needs the JobSet controller, a node pool of the config's topology
# (or GPUs) and the Cloud Storage FUSE driver; docs/pods.md has each command. Build IMAGE from launch/Dockerfile. A
# preempted run restarts by itself, one that ends with an error of the user does not; to resume a JobSet that has ended,
# run `kubectl delete jobset $NAME` and the same command again.
set -euo pipefail
((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] >= 44)) ||
  { echo "error: bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2 && exit 1; }
cd "$(dirname "$0")/.."

CONFIG=${1:?the config file comes first: launch/gke_jobset.sh configs/NAME.py --workdir=/mnt/runs/NAME}
export NAME=${NAME:?set NAME to a name for the JobSet}
export IMAGE=${IMAGE:?set IMAGE to the container image}
export BUCKET=${BUCKET:?set BUCKET to the Cloud Storage bucket that every pod mounts at /mnt/runs}
export SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} # Kubernetes service account with access to BUCKET
export SECRET=${SECRET:-msd-jax} # its keys become variables: kubectl create secret generic msd-jax --from-env-file=FILE
export RESTARTS=${RESTARTS:-100} # how often the JobSet restarts before it counts as failed
export GRACE=${GRACE:-300}       # seconds between SIGTERM and SIGKILL, in which a step ends and is saved
export PRIORITY=${PRIORITY:-}    # a PriorityClass
QUEUE=${QUEUE:-}                 # a LocalQueue of Kueue
CAPACITY=${CAPACITY:-}           # spot, flex-start, queued (flex-start by Kueue) or reservation=NAME
NODE_LABELS=${NODE_LABELS:-}     # further labels that nodes must have, as KEY=VALUE KEY=VALUE
CHIPS_PER_NODE=${CHIPS_PER_NODE:-} # of your node pool if it has others, such as 4 for v6e:2x4 on ct6e-standard-4t
GPU=${GPU:-nvidia-h100-80gb}     # label cloud.google.com/gke-accelerator of the nodes
NAMESPACE=${NAMESPACE:-default}
export MODULE=${MODULE:-msd_jax.main} # msd_jax.check measures devices and network instead
PYTHON=${PYTHON:-python} # on this machine, with msd_jax installed
shift

fail() {
  echo "error: $1" >&2
  exit 1
}
mapping() { # of KEY=VALUE words
  "$PYTHON" -c 'import json, sys; print(json.dumps(dict(word.split("=", 1) for word in sys.argv[1:])))' "$@"
}

[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "NAME=$NAME: a JobSet's name begins with a letter and has lower-case letters, digits and hyphens, 40 at most"
below=()
[[ $MODULE != msd_jax.main ]] || below=(--below=/mnt/runs) # a pod keeps nothing else
facts=$("$PYTHON" -m msd_jax.topology --config="$CONFIG" "${below[@]}" "$@")
set -a
eval "$facts" # ACCELERATOR, and SLICES, HOSTS, CHIPS_PER_HOST, GKE_ACCELERATOR, GKE_TOPOLOGY or NODES, GPUS_PER_NODE
set +a
if [[ $ACCELERATOR == tpu ]]; then
  labels=("cloud.google.com/gke-tpu-accelerator=$GKE_ACCELERATOR" "cloud.google.com/gke-tpu-topology=$GKE_TOPOLOGY")
  if [[ -n $CHIPS_PER_NODE ]]; then
    ((HOSTS * CHIPS_PER_HOST % CHIPS_PER_NODE == 0)) ||
      fail "CHIPS_PER_NODE=$CHIPS_PER_NODE does not divide the $((HOSTS * CHIPS_PER_HOST)) chips of a slice"
    HOSTS=$((HOSTS * CHIPS_PER_HOST / CHIPS_PER_NODE)) CHIPS_PER_HOST=$CHIPS_PER_NODE
  fi
  ((SLICES == 1 || HOSTS > 1)) ||
    fail "config.launch.slices=$SLICES slices of one host: GKE joins only larger slices, of several hosts"
else
  ((GPUS_PER_NODE > 0)) || fail "config.launch.gpus_per_node=0: GKE runs this on GPUs; set the GPUs of a node"
  labels=("cloud.google.com/gke-accelerator=$GPU")
fi
tolerations=""
case $CAPACITY in
  "") ;;
  spot) labels+=("cloud.google.com/gke-spot=true") ;;
  flex-start) labels+=("cloud.google.com/gke-flex-start=true") ;;
  queued) labels+=("cloud.google.com/gke-queued=true") ;;
  reservation=?*) labels+=("cloud.google.com/reservation-name=${CAPACITY#*=}") ;;
  *) fail "CAPACITY=$CAPACITY: choose spot, flex-start, queued or reservation=NAME, or leave it empty" ;;
esac
if [[ $CAPACITY == spot || $CAPACITY == queued ]]; then # node pools of these may carry a taint of the same name
  tolerations=", {key: cloud.google.com/gke-$CAPACITY, operator: Exists, effect: NoSchedule}"
fi
export TOLERATIONS=$tolerations
# shellcheck disable=SC2086  # NODE_LABELS is several labels
NODE_SELECTOR=$(mapping "${labels[@]}" $NODE_LABELS)
LABELS=$(mapping ${QUEUE:+"kueue.x-k8s.io/queue-name=$QUEUE"})
ARGS=$("$PYTHON" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' --config="$CONFIG" "$@")
export ARGS LABELS NODE_SELECTOR

fill='import os, string, sys; print(string.Template(open(sys.argv[1]).read()).substitute(os.environ))'
manifest=$("$PYTHON" -c "$fill" "launch/gke_$ACCELERATOR.yaml")
if [[ -n ${DRY_RUN:-} ]]; then
  echo "$manifest"
else
  kubectl apply --namespace "$NAMESPACE" -f - <<<"$manifest"
  echo "to follow the run: kubectl logs --namespace $NAMESPACE --follow --container msd-jax --tail=-1 --selector" \
    "jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" >&2
fi
