#!/usr/bin/env bash
# Train CONFIG with torchrun, the same command on every machine:
#   launch/torchrun.sh CONFIG [key=value ...]
# By environment:
#   NPROC_PER_NODE   processes on this machine; default: one for each GPU that is visible
#   NNODES           machines, default 1. With more than one, all of them need the dataset and the runs folder, and:
#   NODE_RANK        which of them this is, from 0; default: SLURM's number
#   MASTER_ADDR, MASTER_PORT   machine 0 and a port that is open on it, default 29500
#   PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT   the same as Kubeflow's operators set them
#   PYTHON           interpreter that has dctc, default python
#   SHUTDOWN_TIMEOUT seconds from the signal to stop until ranks that are still there are killed, default 100
# On CPU: ACCELERATE_USE_CPU=true NPROC_PER_NODE=2 launch/torchrun.sh CONFIG
# SIGTERM, SIGINT and SIGUSR1 to this script ask the ranks for a checkpoint. Exit code: dctc's own, 75 included.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

refuse() { echo "error: $*" >&2 && exit 2; }

(($#)) || refuse "usage: launch/torchrun.sh CONFIG [key=value ...]"
nodes=${NNODES:-${PET_NNODES:-1}}
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    ((NPROC_PER_NODE)) || refuse "no GPU is visible here: set NPROC_PER_NODE, and ACCELERATE_USE_CPU=true to train on the CPU"
fi
if ((nodes > 1)); then
    rank=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}
    address=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
    [[ $rank ]] || refuse "NNODES is $nodes: set NODE_RANK, from 0"
    [[ $address ]] || refuse "NNODES is $nodes: set MASTER_ADDR to the address of machine 0"
    rendezvous=(--nnodes "$nodes" --node-rank "$rank"
        --master-addr "$address" --master-port "${MASTER_PORT:-${PET_MASTER_PORT:-29500}}")
else
    # A free port, so that several jobs can share a machine; the address spares a look-up of the host's name.
    rendezvous=(--standalone --nnodes 1 --local-addr 127.0.0.1)
fi
. "$here/env.sh"

# torchrun ends with 1 whatever its ranks end with, so each rank leaves its code here.
DCTC_EXIT_CODES=$(mktemp -d "${TMPDIR:-/tmp}/dctc-exit.XXXXXX")
export DCTC_EXIT_CODES
trap 'rm -rf "$DCTC_EXIT_CODES"' EXIT

asked=
ask() {
    if [[ ! $asked ]]; then # once is enough, and torchrun does not wait for its ranks after a third signal
        asked=1
        kill -TERM "$launcher" 2>/dev/null || true
    fi
}

# Job control puts torchrun into a process group of its own, so that Ctrl-C reaches it once, through the trap. For the
# same reason it leaves the other signals to this script: SLURM sends SIGUSR1 to every process of a step.
set -m
(
    trap '' INT HUP USR1 # ignored also by the ranks, until they say what they do at them
    # When this script is killed, torchrun is asked to stop instead of training on without it.
    if command -v setpriv >/dev/null; then start=(setpriv --pdeathsig TERM); else start=(); fi
    exec "${start[@]}" "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" \
        --signals-to-handle SIGTERM --shutdown-timeout "${SHUTDOWN_TIMEOUT:-100}" "$here/rank.py" "$@" </dev/null
) &
launcher=$!
trap ask TERM INT HUP USR1
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a trap interrupts wait
    status=0
    wait "$launcher" || status=$?
done

codes=() # of the ranks that ended by themselves
killed=
for file in "$DCTC_EXIT_CODES"/*; do
    if [[ -s $file ]]; then codes+=("$(<"$file")"); elif [[ -e $file ]]; then killed=1; fi
done
for code in "${codes[@]}"; do
    if ((code != 0 && code != 75)); then exit "$code"; fi
done
if ((${#codes[@]} == NPROC_PER_NODE)); then
    if [[ " ${codes[*]} " == *" 75 "* ]]; then exit 75; fi
    exit 0
fi
# Some rank was killed, or did not begin. Where the signal came that early, nothing is lost.
if [[ $asked && ! $killed ]]; then exit 75; fi
exit $((status ? status : 1))
