#!/usr/bin/env bash
# Runs on GKE: fills in launch/gke_jobset.yaml from config.launch and applies it.
#
#   NAME=my-run IMAGE=REGISTRY/msd_jax:tpu BUCKET=my-bucket \
#     launch/gke_jobset.sh configs/NAME.py --workdir=/mnt/runs/my-run [flags of msd_jax.main]
#
# DRY_RUN=1 prints the manifest instead. The cluster needs the JobSet controller, a TPU node pool of the config's
# topology and, for BUCKET, the Cloud Storage FUSE driver. Build IMAGE from launch/Dockerfile. A preempted slice
# restarts by itself; to resume a JobSet that has ended, run `kubectl delete jobset $NAME` and the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${1:?the config file comes first: launch/gke_jobset.sh configs/NAME.py --workdir=/mnt/runs/NAME}
export NAME=${NAME:?set NAME to a name for the JobSet}
export IMAGE=${IMAGE:?set IMAGE to the container image}
export BUCKET=${BUCKET:?set BUCKET to the Cloud Storage bucket that every pod mounts at /mnt/runs}
export SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} # Kubernetes service account with access to BUCKET
export RESTARTS=${RESTARTS:-100}                   # how often the JobSet restarts before it counts as failed
NAMESPACE=${NAMESPACE:-default}
PYTHON=${PYTHON:-python} # on this machine, with msd_jax installed
shift

facts=$("$PYTHON" -m msd_jax.topology --want=tpu --config="$CONFIG" "$@")
set -a
eval "$facts" # SLICES, HOSTS, CHIPS_PER_HOST, GKE_ACCELERATOR, GKE_TOPOLOGY
set +a
ARGS=$("$PYTHON" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' --config="$CONFIG" "$@")
export ARGS

fill='import os, string; print(string.Template(open("launch/gke_jobset.yaml").read()).substitute(os.environ))'
manifest=$("$PYTHON" -c "$fill")
if [[ -n ${DRY_RUN:-} ]]; then
  echo "$manifest"
else
  kubectl apply --namespace "$NAMESPACE" -f - <<<"$manifest"
  echo "to follow the run: kubectl logs --namespace $NAMESPACE -f jobs/$NAME-slice-0" >&2
fi
