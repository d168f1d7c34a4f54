#!/usr/bin/env bash
# One training over several machines without a scheduler: run this on every one of them, at about the same time.
#
#   on the first:    scripts/launch_nodes.sh align.yaml 0 4 10.0.0.1 --round 1
#   on the second:   scripts/launch_nodes.sh align.yaml 1 4 10.0.0.1 --round 1
#   ...              (configuration, this machine's rank, machines, address of rank 0, arguments of `align dpo`)
#
# The run's folder, the checkpoint and the images must lie on a file system that all machines see under one path.
# Sampling, scoring and evaluation work the same way: set STAGE=sample, score or evaluate.
set -euo pipefail

CONFIG=${1:?which align.yaml?}
MACHINE_RANK=${2:?rank of this machine, from 0}
NUM_MACHINES=${3:?number of machines}
FIRST_MACHINE=${4:?address of the machine with rank 0}
shift 4

export OMP_NUM_THREADS=1
# The interface that the machines reach each other by, where there are several:
# export NCCL_SOCKET_IFNAME=eth0

exec align "${STAGE:-dpo}" --config "$CONFIG" \
    --set launch.num_processes="${GPUS_PER_MACHINE:-8}" \
    --set launch.num_machines="$NUM_MACHINES" \
    --set launch.machine_rank="$MACHINE_RANK" \
    --set launch.main_process_ip="$FIRST_MACHINE" \
    --set launch.main_process_port="${PORT:-29500}" \
    --set launch.strategy="${STRATEGY:-zero3}" \
    "$@"
