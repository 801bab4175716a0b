"""The launch scripts against a recording stand-in for gcloud: exact commands, refusals, and one pre-empted run, played
through on folders that stand for the VM and the bucket. Nothing here has seen a TPU."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TPU = REPOSITORY / "tpu"
SCRIPTS = sorted(path for path in TPU.glob("*.sh") if path.name != "common.sh")
CLOUD_SCRIPTS = [path for path in SCRIPTS if path.name != "worker.sh"]
SLICE = ("--name=demo", "--zone=us-east5-b", "--project=mine", "--accelerator=v6e-8")
WHERE = ["--zone=us-east5-b", "--project=mine"]
COMMAND = ("python", "-m", "safegrpo_jax.main", "--config=configs/base.py")
KEEP = "--keep=gs://mine/runs/demo"
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
DESCRIBE = [*QUEUE, "describe", "demo", *WHERE, "--format=value(state.state)"]
CREATE = [*QUEUE, "create", "demo", *WHERE, "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]
CREATE += ["--node-id=demo"]
DELETE = [*QUEUE, "delete", "demo", *WHERE, "--force", "--quiet"]
# Only a hang reaches these, on a busy machine too.
TIMEOUT = 90


class Cloud:
    """A folder with the stand-in's programs, its scenario and what it recorded."""

    def __init__(self, root, names):
        self.root = root
        (root / "bin").mkdir()
        source = (Path(__file__).parent / "stand_in.py").read_text()
        # -S and -I: a bare start is five times faster, and the stand-in is started a hundred times.
        (root / "stand_in").write_text(f"#!{sys.executable} -IS\n{source}")
        (root / "stand_in").chmod(0o755)
        for name in names:
            (root / "bin" / name).symlink_to(root / "stand_in")
        self.answer()

    def answer(self, **scenario):
        (self.root / "scenario.json").write_text(json.dumps(scenario))

    def start(self, script, *args):
        path = f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return subprocess.Popen(
            [TPU / script, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={"PATH": path, "STAND_IN": str(self.root), "TMPDIR": str(self.root), "HOME": str(self.root)},
        )

    def run(self, script, *args):
        process = self.start(script, *args)
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def calls(self, *names):
        file = self.root / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if call[0] in (names or ("gcloud",))]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path, ["gcloud", "sleep"])


@pytest.fixture
def running_cloud(tmp_path):
    """Executes what it is sent; sleeping is real there, because programs really run."""
    return Cloud(tmp_path, ["gcloud", "python3", "uv"])


def ssh(node, text, worker="all"):
    return [*VM, "ssh", node, *WHERE, f"--worker={worker}", f"--command={text}"]


def verbs(calls):
    """`create`, `ssh start`, ... of recorded calls: the sequence, where the exact words are checked elsewhere."""
    names = []
    for call in calls:
        text = call[-1]
        asked = text.rpartition("worker.sh ")[2].split()[0].rstrip(";") if "worker.sh " in text else ""
        names.append(f"{call[4]} {asked}".rstrip())
    return names


def wait_until(condition, seconds=TIMEOUT):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


# --- create, setup, run, logs, fetch, delete


def test_create_asks_and_waits_until_active(cloud):
    missing = {"rc": 1, "stderr": "ERROR: NOT_FOUND: Resource was not found"}
    cloud.answer(states=[missing, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    result = cloud.run("create.sh", *SLICE, "--spot", "--create-flag=--network=my net")
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == [[*CREATE, "--spot", "--async", "--quiet", "--network=my net"], *[DESCRIBE] * 4]
    assert cloud.calls("sleep") == [["sleep", "30"]] * 3


def test_on_demand_is_the_default(cloud):
    cloud.answer(states=["ACTIVE"])
    assert cloud.run("create.sh", *SLICE, "--runtime=mine").returncode == 0
    assert "--spot" not in cloud.calls()[0]
    assert "--runtime-version=mine" in cloud.calls()[0]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_with_a_dead_request(cloud, state):
    cloud.answer(states=["WAITING_FOR_RESOURCES", state])
    result = cloud.run("create.sh", *SLICE)
    assert result.returncode == 1
    assert f"demo is {state}" in result.stderr


def test_create_ends_at_its_timeout_and_waiting_goes_on_without_asking_again(cloud):
    cloud.answer(states=["WAITING_FOR_RESOURCES", "ACTIVE"])
    result = cloud.run("create.sh", *SLICE, "--timeout=2", "--poll=5")
    assert result.returncode == 1
    assert "--timeout=2" in result.stderr and "--wait-only" in result.stderr
    assert cloud.run("create.sh", *SLICE, "--wait-only").returncode == 0
    assert verbs(cloud.calls()) == ["create", "describe", "describe"]


def test_wait_only_needs_a_request(cloud):
    cloud.answer(states=[{"rc": 1, "stderr": "NOT_FOUND"}])
    assert cloud.run("create.sh", *SLICE, "--wait-only").returncode == 2


def test_two_slices_are_two_nodes(cloud):
    cloud.answer(states=["ACTIVE"])
    two = (*SLICE, "--slices=2", "--multi-host")
    result = cloud.run("create.sh", *two)
    assert result.returncode == 0
    assert "warning: 2 hosts" in result.stderr
    assert cloud.calls()[0] == [*CREATE[:-1], "--node-count=2", "--node-prefix=demo", "--async", "--quiet"]
    assert cloud.run("run.sh", *two, "--", *COMMAND).returncode == 0
    start = f"cd safegrpo_jax && tpu/worker.sh start -- {shlex.join(COMMAND)}"
    assert cloud.calls()[2:] == [ssh("demo-0", start), ssh("demo-1", start)]


def test_run_starts_on_all_workers(cloud):
    assert cloud.run("run.sh", *SLICE, KEEP, "--", *COMMAND).returncode == 0
    keep = f"{KEEP} --keep-every=300"
    assert cloud.calls() == [
        ssh("demo", f"cd safegrpo_jax && tpu/worker.sh start {keep} -- {shlex.join(COMMAND)}"),
    ]


def test_logs_stop_and_delete(cloud):
    assert cloud.run("logs.sh", *SLICE, "--lines=7", "--worker=1").returncode == 0
    assert cloud.run("logs.sh", *SLICE, "--no-follow").returncode == 0
    assert cloud.run("stop.sh", *SLICE).returncode == 0
    assert cloud.run("delete.sh", *SLICE).returncode == 0
    assert cloud.run("delete.sh", *SLICE, "--yes").returncode == 0
    assert cloud.calls() == [
        ssh("demo", "tail -n 7 -F safegrpo_jax/workdirs/launch.log", "1"),
        ssh("demo", "tail -n 100 safegrpo_jax/workdirs/launch.log", "0"),
        ssh("demo", "cd safegrpo_jax && tpu/worker.sh stop"),
        DELETE[:-1],
        DELETE,
    ]


def test_status(cloud):
    cloud.answer(states=["ACTIVE", "SUSPENDED"], runs=["run: exited 0"])
    assert cloud.run("status.sh", *SLICE).stdout == "demo: ACTIVE\nrun: exited 0\n"
    assert cloud.run("status.sh", *SLICE).stdout == "demo: SUSPENDED\n"


def test_setup_installs_what_is_here_and_run_uses_it(running_cloud, tmp_path):
    cloud = running_cloud
    cloud.answer(execute=True)
    (tmp_path / "vm").mkdir()
    (tmp_path / "bucket/mine/my model").mkdir(parents=True)
    (tmp_path / "bucket/mine/my model/config.json").write_text("{}")
    secret = tmp_path / "it's a: file"
    secret.write_text("# a comment\nHF_TOKEN=a b'c$(touch hacked)")
    result = cloud.run("setup.sh", *SLICE, "--input=gs://mine/my model/", f"--env-file={secret}")
    assert result.returncode == 0, result.stderr
    checkout = tmp_path / "vm/safegrpo_jax"
    assert (checkout / "safegrpo_jax/main.py").read_text() == (REPOSITORY / "safegrpo_jax/main.py").read_text()
    assert (checkout / "inputs/my model/config.json").exists()
    assert (tmp_path / "vm/safegrpo_jax.env").stat().st_mode & 0o777 == 0o600
    jax_version = next(
        line.removeprefix("jax==")
        for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
        if line.startswith("jax==")
    )
    assert [call[:2] + call[-2:] for call in cloud.calls("uv")] == [
        ["uv", "venv", "--python=3.11", ".venv"],
        ["uv", "pip", "--requirement=requirements.txt", f"jax[tpu]=={jax_version}"],
    ]
    assert not any("HF_TOKEN" in word or "hacked" in word for call in cloud.calls() for word in call)

    told = 'import os, sys; print([os.environ["HF_TOKEN"], *sys.argv[1:]])'
    hard = ["it's", 'a "b"', "$(touch hacked)", "`x`; y", "line\nbreak", "*", "", "é\\"]
    result = cloud.run("run.sh", *SLICE, "--", "python", "-c", told, *hard)
    assert result.returncode == 0, result.stderr
    wait_until((checkout / ".run/exit_code").exists)
    assert str(["a b'c$(touch hacked)", *hard]) in (checkout / "workdirs/launch.log").read_text()
    assert not list(tmp_path.rglob("hacked"))
    assert (checkout / ".run/exit_code").read_text() == "0\n"


def test_fetch_leaves_checkpoints_unless_asked(running_cloud, tmp_path):
    cloud = running_cloud
    cloud.answer(execute=True)
    checkout = tmp_path / "vm/safegrpo_jax"
    shutil.copytree(TPU, checkout / "tpu")
    for name in ("workdirs/a b/report.html", "workdirs/a b/checkpoints/grpo/1/files.json", "workdirs/a b/export/x"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    to = tmp_path / "my 'results'"
    assert cloud.run("fetch.sh", *SLICE, f"--to={to}").returncode == 0
    assert [str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()] == ["workdirs/a b/report.html"]
    assert [call[4] for call in cloud.calls()] == ["ssh", "scp"]
    assert cloud.calls()[1][5] == "demo:safegrpo_jax_results.tar.gz"
    assert cloud.run("fetch.sh", *SLICE, f"--to={to}", "--with-checkpoints").returncode == 0
    assert (to / "workdirs/a b/checkpoints/grpo/1/files.json").exists()
    assert (to / "workdirs/a b/export/x").exists()
    with tarfile.open(tmp_path / "vm/safegrpo_jax_results.tar.gz") as archive:
        assert "workdirs/a b/export/x" in archive.getnames()


# --- resume


def resume(cloud, *flags):
    return cloud.run("resume.sh", *SLICE, "--spot", KEEP, *flags, "--", *COMMAND)


RECOVERY = ["create", "describe", "scp", "ssh", "ssh install", "ssh start"]
LOOK = ["describe", "describe", "ssh status"]  # the watcher's own look, then status.sh's


@pytest.mark.parametrize("dead", ["SUSPENDED", "FAILED"])
def test_a_preempted_run_is_brought_back_with_the_same_command(cloud, dead):
    cloud.answer(
        states=["ACTIVE", "ACTIVE", "SUSPENDING", dead, "ACTIVE"],
        runs=["run: running", "run: exited 0"],
    )
    result = resume(cloud)
    assert result.returncode == 0, result.stderr
    calls = cloud.calls()
    assert verbs(calls) == [*LOOK, "describe", "describe", "delete", *RECOVERY, *LOOK]
    assert calls[5] == DELETE
    assert calls[6] == [*CREATE, "--spot", "--async", "--quiet"]
    keep = f"{KEEP} --keep-every=300"
    assert calls[11] == ssh("demo", f"cd safegrpo_jax && tpu/worker.sh start {keep} -- {shlex.join(COMMAND)}")
    assert "try 1 of 10" in result.stderr


def test_resume_creates_what_is_missing(cloud):
    missing = {"rc": 1, "stderr": "NOT_FOUND"}
    cloud.answer(states=[missing, "ACTIVE"], runs=["run: exited 0"])
    assert resume(cloud).returncode == 0
    assert verbs(cloud.calls()) == ["describe", *RECOVERY, *LOOK]


def test_resume_sets_up_a_bare_slice(cloud):
    cloud.answer(states=["ACTIVE"], runs=["run: absent", "run: exited 0"])
    assert resume(cloud).returncode == 0
    assert verbs(cloud.calls()) == [*LOOK, "scp", "ssh", "ssh install", "ssh start", *LOOK]


def test_exit_143_starts_again_and_does_not_create_while_the_slice_is_there(cloud):
    cloud.answer(states=["ACTIVE"], runs=["run: exited 143", "run: exited 0"])
    assert resume(cloud).returncode == 0
    assert verbs(cloud.calls()) == [*LOOK, "describe", "ssh start", *LOOK]


def test_a_restarted_vm_starts_again(cloud):
    cloud.answer(states=["ACTIVE"], runs=["run: lost", "run: exited 0"])
    assert resume(cloud).returncode == 0
    assert verbs(cloud.calls()) == [*LOOK, "describe", "ssh start", *LOOK]


@pytest.mark.parametrize(("code", "words"), [(130, "by a person"), (1, "failed"), (2, "failed"), (74, "failed")])
def test_other_exit_codes_are_final(cloud, code, words):
    cloud.answer(states=["ACTIVE"], runs=[f"run: exited {code}"])
    result = resume(cloud)
    assert result.returncode == code
    assert words in result.stderr
    assert verbs(cloud.calls()) == LOOK


def test_one_failed_worker_of_several_is_a_failure(cloud):
    cloud.answer(states=["ACTIVE"], runs=["run: exited 0\nrun: exited 1"])
    assert resume(cloud).returncode == 1


def test_tries_are_bounded(cloud):
    cloud.answer(states=["SUSPENDED"], runs=[])
    result = resume(cloud, "--max-tries=3")
    assert result.returncode == 1
    assert "--max-tries=3" in result.stderr and "SUSPENDED" in result.stderr
    assert verbs(cloud.calls()).count("create") == 3


def test_silence_is_bounded_and_starts_nothing(cloud):
    cloud.answer(states=["ACTIVE"], runs=[{"rc": 255, "stderr": "ssh: connect: timed out"}])
    result = resume(cloud, "--max-silence=4")
    assert result.returncode == 1
    assert "--max-silence=4" in result.stderr and "timed out" in result.stderr
    assert verbs(cloud.calls()) == LOOK * 4


def test_an_unreachable_service_is_not_a_missing_resource(cloud):
    cloud.answer(states=[{"rc": 1, "stderr": "ERROR: 503 backend"}] * 2 + ["ACTIVE"], runs=["run: exited 0"])
    assert resume(cloud).returncode == 0
    assert verbs(cloud.calls()) == ["describe", "describe", *LOOK]


# --- a run that is pre-empted, played through

PROGRAM = """
import pathlib, signal, sys, time
steps = pathlib.Path("workdirs/run/checkpoints/step")
steps.parent.mkdir(parents=True, exist_ok=True)
first = int(steps.read_text()) if steps.exists() else 0
print("begins at", first, flush=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
for step in range(first, first + int(sys.argv[1])):
    steps.write_text(str(step + 1))
    time.sleep(0.02)
    if stop:
        sys.exit(130)
"""


def install_by_hand(checkout):
    """What setup.sh leaves, without its copying."""
    shutil.copytree(TPU, checkout / "tpu")
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)


@pytest.fixture
def started(running_cloud, tmp_path):
    """A long run on a slice, with its work directory kept in the bucket."""
    running_cloud.answer(execute=True, states=["ACTIVE"])
    checkout = tmp_path / "vm/safegrpo_jax"
    install_by_hand(checkout)
    result = running_cloud.run("run.sh", *SLICE, KEEP, "--keep-every=1", "--", "python", "-c", PROGRAM, "1000")
    assert result.returncode == 0, result.stderr
    wait_until((checkout / "workdirs/run/checkpoints/step").exists)
    supervisor = int((checkout / ".run/pid").read_text().split()[0])
    yield checkout
    if (Path("/proc") / str(supervisor)).exists():
        os.killpg(supervisor, signal.SIGKILL)


def exit_code(checkout):
    wait_until((checkout / ".run/exit_code").exists)
    return int((checkout / ".run/exit_code").read_text())


def test_preemption_saves_and_the_new_vm_goes_on(running_cloud, started, tmp_path):
    cloud = running_cloud
    assert cloud.run("run.sh", *SLICE, "--", "true").returncode == 2  # one runs already
    assert "run: running" in cloud.run("status.sh", *SLICE).stdout
    os.killpg(int((started / ".run/pid").read_text().split()[0]), signal.SIGTERM)  # as a machine that shuts down
    assert exit_code(started) == 143
    saved = int((started / "workdirs/run/checkpoints/step").read_text())
    assert 0 < saved < 1000
    assert (tmp_path / "bucket/mine/runs/demo/run/checkpoints/step").read_text() == str(saved)

    shutil.rmtree(tmp_path / "vm")
    (tmp_path / "states.used").unlink()
    cloud.answer(execute=True, states=["SUSPENDED", "ACTIVE"])
    flags = ("--poll=1", KEEP, "--", "python", "-c", PROGRAM, "5")
    result = cloud.run("resume.sh", *SLICE, "--spot", *flags)
    assert result.returncode == 0, result.stderr + (started / "workdirs/launch.log").read_text()
    assert int((tmp_path / "bucket/mine/runs/demo/run/checkpoints/step").read_text()) == saved + 5
    log = (started / "workdirs/launch.log").read_text()
    assert "begins at 0" in log and f"begins at {saved}" in log  # one log over both machines


def test_a_person_stops_it(running_cloud, started):
    assert running_cloud.run("stop.sh", *SLICE).returncode == 0
    assert exit_code(started) == 130
    wait_until(lambda: "run: exited 130" in running_cloud.run("status.sh", *SLICE).stdout)
    assert running_cloud.run("stop.sh", *SLICE).returncode != 0


def test_checkpoints_are_kept_while_the_run_goes_on(started, tmp_path):
    wait_until((tmp_path / "bucket/mine/runs/demo/run/checkpoints/step").exists)
    assert not (started / ".run/exit_code").exists()


def test_what_makes_a_checkpoint_count_is_copied_last(running_cloud, started):
    wait_until(lambda: len([call for call in running_cloud.calls() if call[1:3] == ["storage", "rsync"]]) >= 3)
    restore, data, everything = [call[3:] for call in running_cloud.calls() if call[1:3] == ["storage", "rsync"]][:3]
    assert restore == ["--recursive", "gs://mine/runs/demo", "workdirs"]
    there = [".run/snapshot", "gs://mine/runs/demo"]
    assert data == ["--recursive", r"--exclude=.*(files|finished)\.json$", *there]
    assert everything == ["--recursive", "--delete-unmatched-destination-objects", *there]


def test_a_result_that_did_not_reach_the_bucket_is_not_finished(running_cloud, tmp_path):
    cloud = running_cloud
    cloud.answer(execute=True)
    checkout = tmp_path / "vm/safegrpo_jax"
    install_by_hand(checkout)
    go = tmp_path / "go"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)"
    assert cloud.run("run.sh", *SLICE, KEEP, "--", "python", "-c", wait).returncode == 0
    cloud.answer(execute=True, bucket_fails=True)
    go.touch()
    assert exit_code(checkout) == 74
    assert "the results are on this VM only" in (checkout / "workdirs/launch.log").read_text()


def test_a_bucket_without_access_stops_before_the_run(running_cloud, tmp_path):
    running_cloud.answer(execute=True, bucket_fails=True)
    install_by_hand(tmp_path / "vm/safegrpo_jax")
    assert running_cloud.run("run.sh", *SLICE, KEEP, "--", "touch", str(tmp_path / "ran")).returncode != 0
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "vm/safegrpo_jax/.run/pid").exists()


def test_a_vm_never_copies_over_the_folder_of_another_run(running_cloud, started):
    os.killpg(int((started / ".run/pid").read_text().split()[0]), signal.SIGTERM)
    exit_code(started)
    wait_until(lambda: "running" not in running_cloud.run("status.sh", *SLICE).stdout)
    result = running_cloud.run("run.sh", *SLICE, "--keep=gs://mine/runs/other", "--", "true")
    assert result.returncode == 2
    assert "gs://mine/runs/demo" in result.stderr


# --- all scripts

OF_SCRIPT = {"run.sh": ("--", *COMMAND), "resume.sh": (KEEP, "--", *COMMAND)}


@pytest.mark.parametrize("script", CLOUD_SCRIPTS, ids=lambda path: path.stem)
def test_dry_run_prints_and_runs_nothing(cloud, script):
    hard = ('--name=it\'s a "demo"; x', "--zone=$(touch hacked)", "--project=my project")
    result = cloud.run(script.name, *SLICE, *hard, "--dry-run", *OF_SCRIPT.get(script.name, ()))
    assert result.returncode == 0, result.stderr
    assert cloud.calls("gcloud", "sleep") == []
    printed = [shlex.split(line) for line in result.stdout.splitlines()]
    on_cloud = [words for words in printed if words[0] == "gcloud"]
    assert on_cloud
    for words in on_cloud:  # every word came through the quoting as it went in
        assert {"--zone=$(touch hacked)", "--project=my project"} <= set(words)
        assert any(word.split(":")[0] == 'it\'s a "demo"; x' for word in words)
    assert not list(cloud.root.rglob("hacked"))


def test_dry_run_prints_what_a_real_run_calls(cloud):
    cloud.answer(states=["ACTIVE"])
    for script, flags in (("create.sh", ("--spot",)), ("run.sh", (KEEP, "--", *COMMAND, "it's")), ("delete.sh", ())):
        planned = cloud.run(script, *SLICE, "--dry-run", *flags).stdout.splitlines()
        before = len(cloud.calls())
        assert cloud.run(script, *SLICE, *flags).returncode == 0
        assert [shlex.split(line) for line in planned] == cloud.calls()[before:]


def test_hard_names_are_single_words(cloud):
    name = 'it\'s a "demo" $HOME `x`'
    assert cloud.run("delete.sh", *SLICE, f"--name={name}", "--yes").returncode == 0
    assert cloud.calls() == [[*QUEUE, "delete", name, *WHERE, "--force", "--quiet"]]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(cloud, script):
    result = cloud.run(script.name, "--help")
    assert result.returncode == 0
    assert f"{script.name}" in result.stdout and "--dry-run" in result.stdout
    assert "set -euo pipefail" in script.read_text().splitlines()
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "flags", "names", "remedy"),
    [
        ("create.sh", SLICE[1:], "--name", "write --name=VALUE"),
        ("delete.sh", SLICE[:3], "--accelerator", "--help"),
        ("create.sh", (*SLICE, "--zone="), "--zone", "write --zone=VALUE"),
        ("create.sh", (*SLICE, "--zone"), "--zone", "write --zone=VALUE"),
        ("create.sh", (*SLICE, "--spot=yes"), "--spot", "write --spot"),
        ("create.sh", (*SLICE, "--name=-x"), "--name=-x", "plain value"),
        ("fetch.sh", (*SLICE, "--name=other:x"), "--name=other:x", "letters"),
        ("create.sh", (*SLICE, "--spots"), "--spots", "--help"),
        ("create.sh", (*SLICE, "--keep=gs://x"), "--keep", "--help"),
        ("run.sh", (*SLICE, "--takes_command=x", "--", "x"), "--takes_command", "--help"),
        ("create.sh", (*SLICE, "stray"), "stray", "--name=value"),
        ("create.sh", (*SLICE, "--timeout=soon"), "--timeout=soon", "--timeout=10"),
        ("create.sh", (*SLICE, "--poll=0"), "--poll=0", "--poll=10"),
        ("create.sh", (*SLICE, "--slices=a[$(touch hacked)]"), "--slices", "--slices=10"),
        ("create.sh", (*SLICE, "--accelerator=v5e-8"), "--accelerator=v5e-8", "v5litepod-N"),
        ("create.sh", (*SLICE, "--accelerator=v6e-x"), "--accelerator=v6e-x", "v6e-8"),
        ("create.sh", (*SLICE, "--create-flag=spot"), "--create-flag=spot", "--create-flag=--network"),
        ("create.sh", (*SLICE, "--", "x"), "--", "drop"),
        ("setup.sh", (*SLICE, "--input=/data"), "--input=/data", "--input=gs://"),
        ("setup.sh", (*SLICE, "--env-file=none"), "--env-file=none", "NAME=value"),
        ("logs.sh", (*SLICE, "--slice=1"), "--slice=1", "--slices=N"),
        ("run.sh", SLICE, "--", "-- python -m"),
        ("run.sh", (*SLICE, "--keep=/disk", "--", *COMMAND), "--keep=/disk", "--keep=gs://"),
        ("run.sh", (*SLICE, KEEP, "--", *COMMAND, "--workdir=/disk"), "--workdir=/disk", "--workdir=workdirs/NAME"),
        ("run.sh", (*SLICE, KEEP, "--", *COMMAND, "--workdir=workdirs/../x"), "--workdir", "drop the '..'"),
        ("run.sh", (*SLICE, "--", *COMMAND, "--workdir=gs://a/b"), "--workdir=gs://a/b", "--keep=gs://"),
        ("run.sh", (*SLICE, "--", *COMMAND, "--workdir", "x"), "--workdir", "--workdir=DIR"),
        ("run.sh", (*SLICE, "--", "env", "WANDB_API_KEY=s3cret", *COMMAND), "WANDB_API_KEY", "--env-file=FILE"),
        ("run.sh", (*SLICE, "--", *COMMAND, "--hf_token=s3cret"), "--hf_token", "--env-file=FILE"),
        ("resume.sh", (*SLICE, "--", *COMMAND), "--keep", "--keep=gs://"),
        ("resume.sh", (*SLICE, KEEP, "--max-tries=0", "--", *COMMAND), "--max-tries=0", "--max-tries=10"),
    ],
)
def test_bad_flags_end_with_one_line_that_names_flag_and_remedy(cloud, script, flags, names, remedy):
    result = cloud.run(script, *flags)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert names in result.stderr and remedy in result.stderr
    assert "s3cret" not in result.stderr
    assert cloud.calls() == []
    assert not list(cloud.root.rglob("hacked"))


@pytest.mark.parametrize(
    ("accelerator", "hosts"),
    [("v4-8", 1), ("v4-32", 4), ("v5p-8", 1), ("v5p-16", 2), ("v5litepod-8", 1), ("v5litepod-16", 4), ("v6e-256", 64)],
)
@pytest.mark.parametrize("script", ["create.sh", "run.sh", "resume.sh"])
def test_several_hosts_are_refused_before_anything_starts(cloud, script, accelerator, hosts):
    flags = (*SLICE, f"--accelerator={accelerator}", "--dry-run", *OF_SCRIPT.get(script, ()))
    result = cloud.run(script, *flags)
    assert result.returncode == (0 if hosts == 1 else 2), result.stderr
    if hosts > 1:
        assert f"is {hosts} hosts" in result.stderr and "--multi-host" in result.stderr
        assert result.stdout == ""


def test_several_hosts_keep_their_run_in_a_folder_they_share(cloud):
    pod = (*SLICE, "--accelerator=v4-32", "--multi-host", "--dry-run")
    result = cloud.run("resume.sh", *pod, KEEP, "--", *COMMAND)
    assert result.returncode == 2 and "--workdir=FOLDER" in result.stderr
    result = cloud.run("resume.sh", *pod, "--", *COMMAND, "--workdir=/mnt/runs/demo")
    assert result.returncode == 0
    assert "warning: 4 hosts" in result.stderr


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", *TPU.glob("*.sh")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_no_script_evaluates_text():
    for script in TPU.glob("*.sh"):
        assert "eval" not in script.read_text().split(), script.name
