#!/usr/bin/env bash
# Run a rewarm command on several machines without a scheduler: this file on every one of them, with its number.
#
#   NODE_RANK=0 bash examples/multi_node/torchrun.sh run examples/multi_node/pipeline.yaml --output runs/sft_dpo
#   NODE_RANK=1 bash examples/multi_node/torchrun.sh run examples/multi_node/pipeline.yaml --output runs/sft_dpo
#
# The data, the models and the output folder must be on a file system that all machines share. After a failure
# or a preemption run the same lines again: training goes on from the newest whole checkpoint. Edit these three.
NNODES=${NNODES:-2}                  # machines; the same as trainer.num_nodes
NPROC_PER_NODE=${NPROC_PER_NODE:-8}  # GPUs in each
MASTER_ADDR=${MASTER_ADDR:-node0}    # name or address of machine 0, by which all the others reach it
set -euo pipefail

# How long a machine may take to write its checkpoint when it is told to stop, in seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# One machine less would be another batch, so the number of machines is fixed and nothing restarts by itself.
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0 \
  --node-rank "${NODE_RANK:?set it to 0 on the first machine, 1 on the second, and so on}" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" --no-python rewarm "$@"
