#!/usr/bin/env bash
# Copies what the run left from the first worker to a local folder: report, metrics, rollouts, evaluations, log.
#
#     tpu/fetch.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8 --to=results
#
#   --to=FOLDER          default tpu_results; made if it is not there
#   --with-checkpoints   also checkpoints/ and export/, which may be hundreds of gigabytes

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=([to]=tpu_results [with-checkpoints]=no)
parse_flags "$@"
pack=(pack)
[[ ${own[with-checkpoints]} == no ]] || pack+=(--with-checkpoints)
# One archive with a fixed name: scp's two protocols disagree about quoting remote paths, so none is ever sent.
remote_worker "${nodes[0]}" 0 "${pack[@]}"
execute gcloud compute tpus tpu-vm scp "${nodes[0]}:$RESULTS" "$scratch/$RESULTS" "${location[@]}" --worker=0
execute mkdir -p -- "${own[to]}"
execute tar --extract --gzip --file="$scratch/$RESULTS" --directory="${own[to]}"
[[ $dry_run == yes ]] || say "fetched into ${own[to]}"
