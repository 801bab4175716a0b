# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this file read the variables set here
# Shared by the scripts of this folder: flags, quoting, the gcloud calls. Sourced, never run.
#
# A script sets `own` (its flags with their defaults) and calls parse_flags "$@". Flags are written --name=value, as the
# program writes them. The shared ones are accepted everywhere, so that one array of flags serves all scripts.

SHARED_HELP='Shared flags, accepted by every script:
  --name=NAME          queued resource and, for one slice, its node
  --zone=ZONE          e.g. us-east5-b
  --project=PROJECT    the project that is billed
  --accelerator=TYPE   v4-8, v5p-8, v5litepod-8, v6e-8, ... (one host; see --multi-host)
  --runtime=VERSION    software of the VM; default by accelerator type
  --slices=N           default 1; more are joined over the data center network (multislice)
  --spot               spot VMs: cheaper, may be pre-empted
  --multi-host         allow several hosts; they need --distributed and a --workdir that all of them mount
  --create-flag=FLAG   passed on to "queued-resources create", may be repeated, e.g. --create-flag=--network=mine
  --input=gs://FOLDER  copied by setup to inputs/<its last name> on every worker, may be repeated
  --env-file=FILE      lines NAME=value, copied by setup, mode 600, into the environment of the run: for secrets
  --dry-run            print the commands, shell-quoted, and run none
  --help               this text'
RESULTS=safegrpo_jax_results.tar.gz # on the worker, in the home folder

name='' zone='' project='' accelerator='' runtime='' slices=1 spot=no multi_host=no env_file='' dry_run=no
create_flags=() inputs=() command=() pass_on=() nodes=() location=() hosts=1 scratch=''

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# One word for a POSIX shell. Not printf %q: its $'..' form is for bash alone, and the far side chooses its shell.
quote() {
  local escaped="'\\''"
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/"$escaped"}"
  fi
}

quote_all() {
  local word separator=''
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=' '
  done
}

execute() {
  if [[ $dry_run == yes ]]; then
    quote_all "$@"
    printf '\n'
  else
    "$@"
  fi
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  printf '%s\n' "$SHARED_HELP"
}

parse_flags() {
  local flag value
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old; install 4.4 or newer"
  while (($#)); do
    case $1 in
      --) break ;;
      --help | -h)
        usage
        exit 0
        ;;
      --?*=*) set_flag "$1" "${1%%=*}" "${1#*=}" ;;
      --?*) set_switch "$1" ;;
      *) die "unexpected argument $(quote "$1"); flags are written --name=value" ;;
    esac
    shift
  done
  if (($#)); then
    shift
    command=("$@")
    [[ -v own[takes_command] ]] || die "--: this script takes no command; drop what follows --"
    (($#)) || die "--: nothing follows; write -- python -m safegrpo_jax.main --config=FILE"
  fi
  for flag in name zone project accelerator; do
    value=${!flag}
    [[ -n $value ]] || die "--$flag is missing; write --$flag=VALUE (--help lists all flags)"
    # gcloud would read it as a flag of its own.
    [[ $value != -* ]] || die "--$flag=$value: starts with a hyphen; write the plain value"
  done
  # scp reads NAME:PATH, so these would name another machine or a local file.
  [[ $name != *[:/@]* ]] || die "--name=$name: may not hold ':', '/' or '@'; use letters, digits and hyphens"
  require_number slices "$slices"
  [[ -z $env_file || -f $env_file ]] || die "--env-file=$env_file: no such file; write lines NAME=value into it"
  read_accelerator
  location=(--zone="$zone" --project="$project")
  nodes=("$name")
  if ((slices > 1)); then
    nodes=()
    for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
  fi
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
}

set_flag() { # the flag as written, --name, value
  local key=${2#--}
  case $key in
    name | zone | project | accelerator | runtime | slices)
      printf -v "$key" '%s' "$3"
      [[ -n $3 ]] || die "$2 is empty; write $2=VALUE"
      ;;
    env-file) env_file=$3 ;;
    create-flag)
      [[ $3 == --?* ]] || die "$1: write it with its hyphens, e.g. --create-flag=--network=mine"
      create_flags+=("$3")
      ;;
    input)
      [[ $3 == gs://?* ]] || die "$1: only folders of a bucket are copied; write --input=gs://BUCKET/FOLDER"
      inputs+=("$3")
      ;;
    spot | multi-host | dry-run) die "$1: takes no value; write $2" ;;
    *)
      [[ -v own[$key] && $key != takes_command ]] || die "$2: no such flag; --help lists them"
      [[ ${own[$key]} != yes && ${own[$key]} != no ]] || die "$1: takes no value; write $2"
      [[ -n $3 ]] || die "$2 is empty; write $2=VALUE"
      own["$key"]=$3
      return
      ;;
  esac
  pass_on+=("$1")
}

set_switch() {
  local key=${1#--}
  case $key in
    spot) spot=yes ;;
    multi-host) multi_host=yes ;;
    dry-run) dry_run=yes ;;
    name | zone | project | accelerator | runtime | slices | env-file | create-flag | input)
      die "$1 needs a value; write $1=VALUE"
      ;;
    *)
      [[ -v own[$key] && $key != takes_command ]] || die "$1: no such flag; --help lists them"
      [[ ${own[$key]} == yes || ${own[$key]} == no ]] || die "$1 needs a value; write $1=VALUE"
      own["$key"]=yes
      return
      ;;
  esac
  pass_on+=("$1")
}

require_number() {
  [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || die "--$1=$2: not a whole number above 0; write e.g. --$1=10"
}

# Hosts of a slice and the default runtime. v4 and v5p count TensorCores, two a chip; v5e and v6e count chips. A host
# has four chips, but v5e and v6e slices of up to eight chips are one host.
read_accelerator() {
  local family=${accelerator%-*} count=${accelerator##*-} default
  [[ $family == v4 || $family == v5p || $family == v5litepod || $family == v6e ]] ||
    die "--accelerator=$accelerator: not known here; use v4-N, v5p-N, v5litepod-N (that is v5e) or v6e-N"
  [[ $count =~ ^[1-9][0-9]{0,5}$ ]] || die "--accelerator=$accelerator: ends in no number; write e.g. $family-8"
  case $family in
    v4)
      default=tpu-ubuntu2204-base
      hosts=$(((count + 7) / 8))
      ;;
    v5p)
      default=v2-alpha-tpuv5
      hosts=$(((count + 7) / 8))
      ;;
    v5litepod)
      default=v2-alpha-tpuv5-lite
      hosts=$((count <= 8 ? 1 : (count + 3) / 4))
      ;;
    v6e)
      default=v2-alpha-tpuv6e
      hosts=$((count <= 8 ? 1 : (count + 3) / 4))
      ;;
  esac
  hosts=$((hosts * slices))
  runtime=${runtime:-$default}
}

# Before anything that costs or trains: the hosts must be told of each other and share a work directory.
require_one_host() {
  ((hosts > 1)) || return 0
  [[ $multi_host == yes ]] ||
    die "--accelerator=$accelerator --slices=$slices is $hosts hosts, which share no folder to work in; use one host" \
      "(v4-8, v5p-8, v5litepod-8, v6e-8), or mount one everywhere and pass --multi-host; see tpu/README.md"
  say "warning: $hosts hosts: the command needs --distributed and a --workdir that all of them mount"
}

# A secret on a command line is seen by every user of either machine (ps) and stays in logs.
refuse_secrets() {
  local word lower
  for word in "${command[@]}"; do
    lower=${word,,}
    if [[ $lower =~ (api_?key|access_?key|secret|password|passwd)= || $lower =~ (^|[^a-z_])token= ||
      $lower =~ (^|[^a-z])(hf|hub|auth|access|api|bearer|refresh)_token= ]]; then
      die "${word%%=*}: looks like a secret on a command line; put it into a file and pass --env-file=FILE"
    fi
  done
}

# What a pre-empted VM leaves is only what reached a bucket.
check_keep() {
  local keep=$1 word
  [[ -z $keep || $keep == gs://?* ]] || die "--keep=$keep: not a bucket folder; write --keep=gs://BUCKET/FOLDER"
  [[ -z $keep || $hosts == 1 ]] ||
    die "--keep copies the work directory of one host; with --multi-host write --workdir=FOLDER instead, one that all mount"
  for word in "${command[@]}"; do
    case $word in
      --workdir) die "--workdir: write it in one word, --workdir=DIR, so that it can be checked" ;;
      --workdir=gs://*)
        die "$word: the program writes folders only; use --keep=gs://BUCKET/FOLDER, or mount the bucket"
        ;;
      --workdir=workdirs/?*)
        [[ -z $keep || $word != *..* ]] || die "$word: --keep copies workdirs/ only; drop the '..'"
        ;;
      --workdir=*) [[ -z $keep ]] || die "$word: --keep copies workdirs/ only; write --workdir=workdirs/NAME" ;;
    esac
  done
}

# State of the queued resource, MISSING if there is none. Fails, with gcloud's words, when gcloud could not say.
queue_state() {
  local state
  if state=$(gcloud compute tpus queued-resources describe "$name" "${location[@]}" "--format=value(state.state)" \
    2>"$scratch/describe.txt"); then
    printf '%s\n' "${state:-UNKNOWN}"
  elif grep -q -e NOT_FOUND -e 'was not found' "$scratch/describe.txt"; then
    printf 'MISSING\n'
  else
    cat "$scratch/describe.txt" >&2
    return 1
  fi
}

show_describe() {
  execute gcloud compute tpus queued-resources describe "$name" "${location[@]}" "--format=value(state.state)"
}

# node, worker, shell text
remote_shell() {
  execute gcloud compute tpus tpu-vm ssh "$1" "${location[@]}" --worker="$2" --command="$3"
}

# node, worker, words of worker.sh
remote_worker() {
  local node=$1 worker=$2
  shift 2
  remote_shell "$node" "$worker" "cd safegrpo_jax && tpu/worker.sh $(quote_all "$@")"
}
