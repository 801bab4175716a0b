#!/usr/bin/env bash
# Copies this checkout to every worker of a slice and installs the pinned Python environment there, then the inputs.
#
#     tpu/setup.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8 --input=gs://mine/Qwen3-VL-4B
#
# Repeating it updates the code and leaves workdirs/ alone. Files that git ignores are not looked at: what is copied is
# safegrpo_jax/, configs/, tpu/ and requirements.txt.

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=()
parse_flags "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
archive=$scratch/safegrpo_jax.tar.gz
install=(install)
for input in "${inputs[@]}"; do install+=("--input=$input"); done

execute tar --create --gzip --file="$archive" --directory="$root" --exclude=__pycache__ \
  safegrpo_jax configs tpu requirements.txt
# Under a name that we chose: gcloud would read a colon in the user's as the name of a machine.
[[ -z $env_file ]] || execute cp -- "$env_file" "$scratch/safegrpo_jax.env"
# Old code is removed first: a module that is gone here must not be importable there.
unpack='mkdir -p safegrpo_jax && cd safegrpo_jax && rm -rf safegrpo_jax configs tpu'
unpack+=' && tar --extract --gzip --file=../safegrpo_jax.tar.gz'
for node in "${nodes[@]}"; do
  execute gcloud compute tpus tpu-vm scp "$archive" "$node:safegrpo_jax.tar.gz" "${location[@]}" --worker=all
  if [[ -n $env_file ]]; then
    # The file is made private first, then filled: it is never readable by others.
    remote_shell "$node" all 'touch safegrpo_jax.env && chmod 600 safegrpo_jax.env'
    execute gcloud compute tpus tpu-vm scp "$scratch/safegrpo_jax.env" "$node:safegrpo_jax.env" \
      "${location[@]}" --worker=all
  fi
  remote_shell "$node" all "$unpack"
  remote_worker "$node" all "${install[@]}"
done
