"""Bad input on the command line: one clear line on stderr, exit code 2, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
DEMO = "--config=configs/cpu_demo.py:smoke"

# One process for all cases: importing costs more than the cases. Each prints exit code and the lines on stderr.
DRIVER = """
import contextlib, io, json, sys
from safegrpo_jax import main
cases, results = json.load(sys.stdin), []
for flags in cases:
    sys.argv = ["main", *flags]
    main.FLAGS.unparse_flags()
    for name in [name for name in main.FLAGS if name.startswith("config.")]:  # overrides of the case before
        delattr(main.FLAGS, name)
    main.FLAGS["config"]._value = None
    for name in ("mode", "workdir", "image", "prompt"):
        main.FLAGS[name].value = main.FLAGS[name].default
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
    results.append([code, errors.getvalue()])
print("RESULTS" + json.dumps(results))
"""


def run_cases(cases):
    process = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.split("RESULTS")[1])


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    row = {"prompt": ["hello"], "images": [[]], "text_tag": ["safe"], "image_tag": ["safe"], "combine_tag": ["safe"]}
    for name, changes in {
        "no_column": {"combine_tag": None},
        "bad_tag": {"text_tag": ["harmless"]},
        "bad_image": {"images": [[{"bytes": b"not an image", "path": None}]]},
        "too_long": {"prompt": ["word " * 200]},
    }.items():
        (folder / name).mkdir()
        table = {key: value for key, value in (row | changes).items() if value is not None}
        for split in ("train", "test"):
            pq.write_table(pa.table(table), folder / name / f"{split}.parquet")
    return folder


def test_each_bad_input_gives_one_line_and_leaves_nothing(bad_inputs, tmp_path):
    workdir = tmp_path / "workdir"
    data = ["--config.pretrain.num_steps=0", "--config.cold_start.num_steps=0", "--config.train.replay_batch=0"]
    data += [
        "--config.loss.replay_weight=0.0",
        "--config.evaluation.validate_every=0",
        "--config.evaluation.splits=('test',)",
    ]
    cases = {
        "config is missing": [],
        "no such file": ["--config=configs/nothing.py"],
        "does not run": [f"--config={bad_inputs / 'broken.py'}"],
        'Did you mean "num_steps"': [DEMO, "--config.train.num_stepz=3"],
        "no such argument": ["--config=configs/cpu_demo.py:ful"],
        "Unknown command line flag 'workdri'": [DEMO, "--workdri=x"],
        "unexpected argument": [DEMO, "train"],
        "name a folder; a bucket can be mounted": [DEMO, "--workdir=gs://bucket/run"],
        "prompts_per_step=7 must be a multiple": [DEMO, "--config.train.prompts_per_step=7"],
        "does not exist": [DEMO, f"--config.model.path={bad_inputs / 'nowhere'}"],
        "LlamaForCausalLM": [DEMO, f"--config.model.path={bad_inputs / 'other'}"],
        "--image=FILE and --prompt=TEXT": [DEMO, "--mode=sample"],
        "data path": [DEMO, *data, f"--config.data.path={bad_inputs / 'nowhere'}"],
        "no column 'combine_tag'": [DEMO, *data, f"--config.data.path={bad_inputs / 'no_column'}"],
        "row 0: text_tag": [DEMO, *data, f"--config.data.path={bad_inputs / 'bad_tag'}"],
        "row 0: image": [DEMO, *data, f"--config.data.path={bad_inputs / 'bad_image'}"],
        "exceeds the largest of processor.prompt_buckets": [
            DEMO,
            *data,
            f"--config.data.path={bad_inputs / 'too_long'}",
        ],
    }
    flags = [[*case, f"--workdir={workdir}"] if case and "--workd" not in case[-1] else case for case in cases.values()]
    for (expected, case), (code, errors) in zip(cases.items(), run_cases(flags), strict=True):
        assert code == 2, f"{case}: exit code {code}, {errors}"
        assert errors.startswith("error: ") and errors.count("\n") == 1, f"{case}: {errors}"
        assert expected.lower() in errors.lower(), f"{case}: {errors}"
    left = {path.name for path in workdir.rglob("*")} if workdir.exists() else set()
    assert not left & {"metrics.jsonl", "checkpoints", "summary.json"}, left
