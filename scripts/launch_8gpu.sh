#!/usr/bin/env bash
# Three rounds on one machine with eight GPUs.
#
#   scripts/launch_8gpu.sh align.yaml [--set KEY=VALUE ...]
#
# `align run` starts every stage in eight processes of its own, by `accelerate launch`, and waits for them: sampling,
# scoring and evaluation share the questions, training shares the model. Run it again after any interruption: finished
# stages and questions are kept, training resumes from its last trainer checkpoint.
set -euo pipefail

CONFIG=${1:?which align.yaml?}
shift

# One thread a process; the data loader has workers of its own (dpo.dataloader_num_workers).
export OMP_NUM_THREADS=1

# zero3 spreads weights, gradients and optimiser over the GPUs. By the model of docs/scaling.md a 7B model takes some 23 GiB
# of each in training, and 33 GiB for the whole weights while the reference is computed.
# With 80 GB a GPU zero2 fits too and communicates less; ddp is for adapters (dpo.lora) and small models.
exec align run --config "$CONFIG" \
    --set launch.num_processes=8 \
    --set launch.strategy=zero3 \
    --set dpo.gradient_checkpointing=true \
    --set dpo.save_steps=50 \
    "$@"
