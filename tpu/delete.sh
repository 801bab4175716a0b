#!/usr/bin/env bash
# Deletes the queued resource and its VMs with everything on their disks; billing ends with it. gcloud asks first.
#
#     tpu/delete.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8
#
#   --yes                do not ask

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=([yes]=no)
parse_flags "$@"
# --force: without it a resource that still has VMs is not deleted.
delete=("$name" "${location[@]}" --force)
[[ ${own[yes]} == no ]] || delete+=(--quiet)
execute gcloud compute tpus queued-resources delete "${delete[@]}"
