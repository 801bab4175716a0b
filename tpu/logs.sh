#!/usr/bin/env bash
# Follows the log of the run. Ctrl-C ends the following, not the run.
#
#     tpu/logs.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8
#
#   --lines=N            lines to begin with, default 100
#   --slice=N            default 0
#   --worker=N           default 0
#   --no-follow          print the last lines and end

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=([lines]=100 [slice]=0 [worker]=0 [no-follow]=no)
parse_flags "$@"
require_number lines "${own[lines]}"
[[ ${own[slice]} =~ ^[0-9]{1,5}$ && ${own[slice]} -lt $slices ]] ||
  die "--slice=${own[slice]}: there are $slices slices; write a number from 0, and --slices=N as at creation"
[[ ${own[worker]} =~ ^[0-9]{1,5}$ ]] || die "--worker=${own[worker]}: not a number; write e.g. --worker=0"
# -F, not -f: the file may be made, or replaced, after we started to look.
follow=' -F'
[[ ${own[no-follow]} == no ]] || follow=''
remote_shell "${nodes[${own[slice]}]}" "${own[worker]}" "tail -n ${own[lines]}$follow safegrpo_jax/workdirs/launch.log"
