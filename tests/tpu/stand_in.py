"""What the script tests put first on PATH: it records how it was called and answers from a scenario.

Installed under several names. `gcloud` answers `describe` and `worker.sh status` from lists (the last answer repeats).
With `execute` in the scenario it is a small cloud of folders: ssh runs the text in bash in `vm/`, scp copies, and
gs://NAME is `bucket/NAME`. `sleep` returns at once. `python3` and `uv` stand for the downloads of an installation.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["STAND_IN"])
NAME = Path(sys.argv[0]).name
ARGS = sys.argv[1:]


def next_answer(scenario, key):
    """The next of a list of answers, over all processes; a dict is a failure with its words and exit code."""
    answers = scenario[key]
    used = ROOT / f"{key}.used"
    with used.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        count = int(file.read() or 0)
        file.truncate(0)
        file.write(str(count + 1))
    answer = answers[min(count, len(answers) - 1)]
    if isinstance(answer, dict):
        print(answer["stderr"], file=sys.stderr)
        sys.exit(answer["rc"])
    print(answer)


def local(path):
    """`NODE:path` and `gs://path` as the folders that stand for them."""
    if path.startswith("gs://"):
        return ROOT / "bucket" / path[5:]
    if ":" in path:
        return ROOT / "vm" / path.split(":", 1)[1]
    return Path(path)


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def rsync(source, destination, exclude, delete):
    if not source.is_dir():
        sys.exit(f"no such folder: {source}")
    kept = {path for path in files_of(source) if not (exclude and re.match(exclude, str(path)))}
    for path in kept:
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, destination / path)
    for path in files_of(destination) - kept if delete else ():
        (destination / path).unlink()


def storage(scenario):
    if scenario.get("bucket_fails"):
        print("ERROR: 403 forbidden", file=sys.stderr)
        sys.exit(1)
    flags = [arg for arg in ARGS[2:] if arg.startswith("--")]
    source, destination = (local(arg) for arg in ARGS[2:] if not arg.startswith("--"))
    if ARGS[1] == "cp":
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, destination)
        return
    exclude = next((flag.split("=", 1)[1] for flag in flags if flag.startswith("--exclude=")), "")
    rsync(source, destination, exclude, "--delete-unmatched-destination-objects" in flags)


def gcloud(scenario):
    verb = ARGS[3] if ARGS[0] == "compute" else ARGS[0]
    if verb == "describe":
        next_answer(scenario, "states")
    elif verb == "create" and scenario.get("execute"):
        (ROOT / "vm").mkdir()
    elif verb == "delete" and scenario.get("execute"):
        shutil.rmtree(ROOT / "vm", ignore_errors=True)
    elif verb == "ssh" and scenario.get("execute"):
        text = next(arg.split("=", 1)[1] for arg in ARGS if arg.startswith("--command="))
        sys.exit(subprocess.run(["bash", "-c", text], cwd=ROOT / "vm").returncode)
    elif verb == "ssh" and "worker.sh status" in ARGS[-1]:
        next_answer(scenario, "runs")
    elif verb == "scp" and scenario.get("execute"):
        shutil.copyfile(local(ARGS[4]), local(ARGS[5]))
    elif verb == "storage":
        storage(scenario)


def install():
    if NAME == "python3":
        Path(".uv/bin").mkdir(parents=True)
        Path(".uv/bin/uv").symlink_to(ROOT / "bin" / "uv")
    elif ARGS[0] == "venv":
        Path(".venv/bin").mkdir(parents=True)
        for name in ("python", "python3"):
            Path(".venv/bin", name).symlink_to(sys.executable)


with (ROOT / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([NAME, *ARGS]) + "\n")
if NAME == "gcloud":
    gcloud(json.loads((ROOT / "scenario.json").read_text()))
elif NAME in ("python3", "uv"):
    install()
