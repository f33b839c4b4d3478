#!/usr/bin/env bash
# Runs several processes on this machine, on its CPUs or its NVIDIA GPUs.
#
#   PROCESSES=2 launch/local.sh configs/NAME.py --workdir=DIR [flags of msd_jax.main]
#
# Run the same command again to resume an interrupted run.
set -euo pipefail
((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] >= 44)) ||
  { echo "error: bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2 && exit 1; }

CONFIG=${1:?the config file comes first: launch/local.sh configs/NAME.py --workdir=DIR}
PROCESSES=${PROCESSES:-}                       # default: one per GPU (nvidia-smi), or one without GPUs
DEVICES_PER_PROCESS=${DEVICES_PER_PROCESS:-1}  # on CPUs: devices that each process simulates
PORT=${PORT:-0}                                # of process 0 on 127.0.0.1; 0 picks a free one
PYTHON=${PYTHON:-python}
MODULE=${MODULE:-msd_jax.main}                 # msd_jax.check measures devices and network instead
shift

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
if ((gpus > 0 && PROCESSES > gpus)); then
  echo "error: PROCESSES=$PROCESSES, but this machine has $gpus GPUs; set PROCESSES to at most $gpus" >&2
  exit 1
fi
if ((PORT == 0)); then
  PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((id = 0; id < PROCESSES; id++)); do
  if ((gpus > 0)); then # GPUs id, id + PROCESSES, ...: each GPU belongs to one process
    variables=("CUDA_VISIBLE_DEVICES=$(seq -s, "$id" "$PROCESSES" $((gpus - 1)))")
    variables+=("JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}") # without a driver, an error instead of a run on CPUs
  else
    variables=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$DEVICES_PER_PROCESS")
  fi
  if ((PROCESSES > 1)); then
    variables+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT" "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$PORT")
    variables+=("JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$id")
  fi
  env "${variables[@]}" "$PYTHON" -m "$MODULE" --config="$CONFIG" "$@" &
  pids+=($!)
done

# The processes watch each other and end together. One that cannot end by itself, because it was stopped or hangs, is
# killed once the others had the time to name what they miss. The first status that is not 0 is the run's.
SECONDS_TO_END=45
status=0
ended=
while ((${#pids[@]} > 0)); do
  for id in "${!pids[@]}"; do
    kill -0 "${pids[$id]}" 2>/dev/null && continue
    code=0
    wait "${pids[$id]}" || code=$?
    unset "pids[$id]"
    ended=${ended:-$SECONDS}
    if ((code != 0)); then
      echo "process $id ended with exit code $code" >&2
      status=$((status == 0 ? code : status))
    fi
  done
  if [[ -n $ended ]] && ((SECONDS - ended > SECONDS_TO_END && ${#pids[@]} > 0)); then
    echo "killing what did not end within $SECONDS_TO_END seconds: process ${!pids[*]}" >&2
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.3 &
  wait $! || true # unlike a sleep in the foreground, it lets a signal to this script through at once
done
exit "$status"
