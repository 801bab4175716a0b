#!/usr/bin/env bash
# The part that runs on a worker; the other scripts call it over ssh. It stands in the checkout, in tpu/.
#
#     worker.sh install [--input=gs://FOLDER ...]
#     worker.sh start [--keep=gs://FOLDER --keep-every=SECONDS] -- COMMAND ...
#     worker.sh status | stop
#     worker.sh pack [--with-checkpoints]
#
# install: Python and the pinned requirements into .venv, inputs into inputs/. start: detaches the command and records
# how it ends. status: one line "run: ...". stop: interrupts it. pack: archives workdirs/ without checkpoints.
# --dry-run, before the verb's own flags, prints the commands of install and pack and runs none.
#
# State is in .run/ (this VM only); workdirs/ is what --keep copies.

set -euo pipefail
UV_VERSION=0.13.9
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

log() { printf '[launch %s] %s\n' "$(date -u +%FT%TZ)" "$*"; }

# The VM's own Python is older than the program needs, so uv brings one; --target because Ubuntu locks the system's.
install() {
  local input version folder
  version=$(sed -n 's/^jax==//p' requirements.txt)
  execute python3 -m pip install --quiet --upgrade --target=.uv "uv==$UV_VERSION"
  [[ -x .venv/bin/python ]] || execute .uv/bin/uv venv --python=3.11 .venv
  execute .uv/bin/uv pip install --python=.venv/bin/python --requirement=requirements.txt "jax[tpu]==$version"
  for input in "$@"; do
    folder=${input%/}
    execute mkdir -p "inputs/${folder##*/}"
    execute gcloud storage rsync --recursive "$folder" "inputs/${folder##*/}"
  done
}

# A process id means nothing after a reboot, hence the boot id beside it.
is_running() {
  local pid boot
  [[ -f .run/pid ]] || return 1
  read -r pid boot <.run/pid
  [[ $boot == "$(cat /proc/sys/kernel/random/boot_id)" ]] && kill -0 "$pid" 2>/dev/null
}

start() { # keep, seconds, command
  is_running && die "start: a run is going on here; see tpu/logs.sh, or end it with tpu/stop.sh"
  [[ -x .venv/bin/python ]] || die "start: the environment is missing; run tpu/setup.sh"
  mkdir -p .run workdirs
  rm -f .run/exit_code .run/program_pid
  # Restored before we answer, so that a bucket without access is an error here and not a line in a log.
  [[ -z $1 ]] || restore "$1"
  setsid "$PWD/tpu/worker.sh" supervise "$@" >>workdirs/launch.log 2>&1 </dev/null &
  printf '%s %s\n' "$!" "$(cat /proc/sys/kernel/random/boot_id)" >.run/pid.new
  mv .run/pid.new .run/pid
  log "started; process $!"
}

# Only onto a VM that has not got it yet: afterwards the local files are the newer ones.
restore() {
  if [[ -f .run/restored ]]; then
    # Copying removes from the bucket what is not here, so it must never meet another run's folder.
    [[ $(cat .run/restored) == "$1" ]] ||
      die "--keep=$1: this VM keeps its run in $(cat .run/restored); use that, or a new VM"
    return 0
  fi
  date -u +%FT%TZ >.run/kept_at.txt
  # Writing first makes the folder exist, and shows before hours of training that it can be written.
  gcloud storage cp .run/kept_at.txt "$1/kept_at.txt"
  gcloud storage rsync --recursive "$1" workdirs
  printf '%s\n' "$1" >.run/restored
}

# A checkpoint counts once its files.json exists, a stage once its finished.json does, so those go last, from a
# snapshot: a copy that is cut anywhere holds only whole checkpoints. The snapshot is hard links: no time, no space.
keep_now() {
  rm -rf .run/snapshot
  cp --archive --link workdirs .run/snapshot || return 1
  gcloud storage rsync --recursive '--exclude=.*(files|finished)\.json$' .run/snapshot "$1" || return 1
  gcloud storage rsync --recursive --delete-unmatched-destination-objects .run/snapshot "$1" || return 1
  rm -rf .run/snapshot
}

# Ends at SIGTERM, but not within a copy: two at a time would pull the snapshot from under each other.
keep_while_running() { # folder, seconds
  local nap=''
  trap 'kill "$nap" 2>/dev/null || true; exit 0' TERM
  while true; do
    sleep "$2" &
    nap=$!
    wait "$nap"
    keep_now "$1" || log "could not copy workdirs/ to $1; trying again in $2 seconds"
  done
}

load_environment() {
  local line
  [[ -f ../safegrpo_jax.env ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -z $line || $line == '#'* ]] && continue
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      die "--env-file: a line is not NAME=value; correct the file and run tpu/setup.sh"
    export "${line?}"
  done <../safegrpo_jax.env
}

supervise() { # keep, seconds, command
  local keep=$1 every=$2 code=0 program keeper='' terminated=no
  shift 2
  load_environment
  log "$(quote_all "$@")"
  # A pre-empted VM sends SIGTERM to every process. The program then saves and leaves; that it was this signal and not a
  # person's Ctrl-C is known here, and recorded as 143.
  trap 'terminated=yes; kill -TERM "$program" 2>/dev/null || true' TERM
  PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1 "$@" &
  program=$!
  printf '%s\n' "$program" >.run/program_pid
  if [[ -n $keep ]]; then
    keep_while_running "$keep" "$every" &
    keeper=$!
  fi
  # wait returns early when the trap runs, so it is asked again until the program is gone.
  while true; do
    code=0
    wait "$program" || code=$?
    kill -0 "$program" 2>/dev/null || break
  done
  [[ $terminated == no || $code == 0 ]] || code=143
  if [[ -n $keep ]]; then
    kill "$keeper" 2>/dev/null || true
    wait "$keeper" 2>/dev/null || true
    # A result that is not in the bucket is not finished: 74 keeps tpu/resume.sh from saying so.
    keep_now "$keep" || keep_now "$keep" || {
      log "could not copy workdirs/ to $keep; the results are on this VM only: tpu/fetch.sh"
      [[ $code != 0 ]] || code=74
    }
  fi
  log "exit code $code"
  printf '%s\n' "$code" >.run/exit_code.new
  mv .run/exit_code.new .run/exit_code
}

status() {
  if is_running; then
    echo 'run: running'
  elif [[ -f .run/exit_code ]]; then
    echo "run: exited $(cat .run/exit_code)"
  elif [[ -f .run/pid ]]; then
    echo 'run: lost'
  else
    echo 'run: never'
  fi
}

stop() {
  { is_running && [[ -f .run/program_pid ]]; } || die "stop: nothing runs here; see tpu/status.sh"
  kill -INT "$(cat .run/program_pid)"
}

pack() { # yes: with checkpoints
  local without=(--exclude=checkpoints --exclude=export)
  [[ $1 == no ]] || without=()
  # The run may write while we read; what tar says to that (exit code 1) is no failure of the archive.
  execute tar --create --gzip --file="../$RESULTS" --warning=no-file-changed "${without[@]}" workdirs || (($? == 1))
}

verb=${1:---help}
shift || true
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $verb == supervise ]]; then
  supervise "$@"
  exit 0
fi
keep='' every=300 checkpoints=no
while (($#)); do
  case $verb:$1 in
    *:--dry-run) dry_run=yes ;;
    install:--input=gs://?*) inputs+=("${1#*=}") ;;
    start:--keep=gs://?*) keep=${1#*=} ;;
    start:--keep-every=*)
      every=${1#*=}
      require_number keep-every "$every"
      ;;
    start:--)
      shift
      command=("$@")
      break
      ;;
    pack:--with-checkpoints) checkpoints=yes ;;
    *:--help)
      usage
      exit 0
      ;;
    *) die "$verb: unexpected argument $(quote "$1"); see worker.sh --help" ;;
  esac
  shift
done
case $verb in
  --help) usage ;;
  install) install "${inputs[@]}" ;;
  start)
    ((${#command[@]})) || die "start: the command is missing; end with -- COMMAND"
    [[ $dry_run == no ]] || die "start: has no --dry-run here; tpu/run.sh --dry-run prints what is sent"
    start "${keep%/}" "$every" "${command[@]}"
    ;;
  status) status ;;
  stop) stop ;;
  pack) pack "$checkpoints" ;;
  *) die "$verb: no such verb; see worker.sh --help" ;;
esac
