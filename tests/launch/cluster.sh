#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, over 127.0.0.0/8: one controller, two slurmd. Needs root.
#
#   tests/launch/cluster.sh up DIR      then: export SLURM_CONF=DIR/slurm.conf; sinfo
#   tests/launch/cluster.sh down DIR
#
# Required packages: apt-get install slurm-wlm munge
set -euo pipefail

USER=${USER:-$(id -un)}
COMMAND=${1:?up or down}
DIR=$(realpath -m "${2:?a new directory for the cluster}")
PORT=${PORT:-27000} # of the controller; the nodes take the next two

down() {
  SLURM_CONF=$DIR/slurm.conf scancel --user="$USER" 2>/dev/null && sleep 1 || true
  for file in "$DIR"/*.pid; do
    kill "$(cat "$file" 2>/dev/null)" 2>/dev/null || true # a file may go with its process meanwhile
  done
}

# Debian's slurmd takes its node's name from the hostname, so each runs under its own hostname and knows the other's.
node() {
  # shellcheck disable=SC2016  # expanded by the inner bash
  unshare --uts --mount --propagation=private bash -c '
    hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -D -f "$2/slurm.conf"' \
    node "$1" "$DIR" >"$DIR/$1.log" 2>&1 &
  echo $! >"$DIR/$1.pid"
}

up() {
  mkdir -p "$DIR"/{spool,state}
  printf '127.0.0.1 localhost node1\n127.0.0.2 node2\n' >"$DIR/hosts"
  head -c 1024 /dev/urandom >"$DIR/munge.key" # a key of this cluster alone
  chmod 600 "$DIR/munge.key"
  munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munged.pid" \
    --log-file="$DIR/munged.log" --seed-file="$DIR/munge.seed" 2>"$DIR/munged.err"
  cat >"$DIR/slurm.conf" <<EOF
ClusterName=loopback
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
KillWait=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=node1 NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=1
NodeName=node2 NodeAddr=127.0.0.2 Port=$((PORT + 2)) CPUs=1
PartitionName=all Nodes=ALL Default=YES
EOF
  export SLURM_CONF=$DIR/slurm.conf
  slurmctld -f "$SLURM_CONF" -c
  node node1
  node node2
  for _ in {1..60}; do
    [[ $(sinfo --noheader --Node --states=idle | wc -l) != 2 ]] || return 0
    sleep 0.5
  done
  echo "error: the nodes did not come up:" >&2
  sinfo >&2
  tail -n 5 "$DIR"/*.log >&2
  down
  exit 1
}

"$COMMAND"
