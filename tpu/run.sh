#!/usr/bin/env bash
# Starts a command on all workers, detached: it survives this script, the ssh connection and your laptop.
#
#     tpu/run.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8 --keep=gs://mine/runs/demo \
#         -- python -m safegrpo_jax.main --config=configs/base.py --config.model.path=inputs/Qwen3-VL-4B
#
# The command runs in the folder of the checkout with the environment's python first on PATH. Its output goes to
# workdirs/launch.log (tpu/logs.sh shows it). A second start while one runs is refused.
#
#   --keep=gs://FOLDER   copy workdirs/ there while the run goes on and at its end, and back onto a new VM before it
#                        starts: without it a pre-empted run starts from nothing
#   --keep-every=SECONDS default 300

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=([keep]='' [keep-every]=300 [takes_command]='')
parse_flags "$@"
((${#command[@]})) || die "--: the command is missing; end with -- python -m safegrpo_jax.main --config=FILE"
require_number keep-every "${own[keep-every]}"
require_one_host
refuse_secrets
check_keep "${own[keep]}"
[[ $spot == no || -n ${own[keep]} || $multi_host == yes ]] ||
  say "warning: --spot without --keep=gs://BUCKET/FOLDER: a pre-empted run loses its checkpoints"

start=(start)
[[ -z ${own[keep]} ]] || start+=(--keep="${own[keep]}" --keep-every="${own[keep-every]}")
for node in "${nodes[@]}"; do
  remote_worker "$node" all "${start[@]}" -- "${command[@]}"
done
