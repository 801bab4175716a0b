"""The results table of the README, from the work directories of several seeds.

    python -m tests.benchmarks.demo_table workdirs/seed0 workdirs/seed1 workdirs/seed2

Values are means over the seeds with their range. The 95% interval is that of the mean change: the half widths of the
seeds' own intervals (`evaluation.scores.difference_interval`, which treats the rows before and after as independent)
added in squares. It tells the noise of the test items, not that of the seeds, which is the range.
"""

import json
import math
import sys
from pathlib import Path

from safegrpo_jax.evaluation.scores import difference_interval

SHOWN = {
    "test": ("combined_accuracy", "mean_reward", "sampled_mean_reward", "format_rate"),
    "compositional": ("visual_accuracy", "combined_accuracy", "mean_reward", "sampled_mean_reward", "format_rate"),
    "alarming_benign": ("refusal_rate", "combined_accuracy"),
    "questions": ("answer_accuracy",),
}


def spread(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{sum(values) / len(values):{form}} ({low:{form}} to {high:{form}})"


def main(folders: list[str]) -> None:
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in folders]
    print("| split | metric | items a seed | before | after | change | 95% interval of the mean change |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for split, metrics in SHOWN.items():
        for metric in metrics:
            pairs = [(summary["before"][split][metric], summary["after"][split][metric]) for summary in summaries]
            scale, form = (1, ".3f") if "reward" in metric else (100, ".1f")
            before = spread([scale * first["value"] for first, _ in pairs], form)
            after = spread([scale * second["value"] for _, second in pairs], form)
            changes = [scale * (second["value"] - first["value"]) for first, second in pairs]
            intervals = [difference_interval(first, second) for first, second in pairs]
            half = math.hypot(*(scale * (high - low) / 2 for low, high in intervals)) / len(intervals)
            mean = sum(changes) / len(changes)
            interval = f"{mean - half:+{form}} to {mean + half:+{form}}"
            name = metric.replace("_", " ") + ("" if "reward" in metric else ", %")
            print(
                f"| {split} | {name} | {pairs[0][0]['count']} | {before} | {after} | {spread(changes, '+' + form)} "
                f"| {interval} |"
            )
    seconds = [summary["wall_seconds"] for summary in summaries]
    peaks = [summary["peak_rss_bytes"] / 1e9 for summary in summaries]
    print(f"\nseeds {', '.join(str(summary['seed']) for summary in summaries)}; ", end="")
    print(f"seconds {spread(seconds, '.0f')}; peak memory GB {spread(peaks, '.2f')}")


if __name__ == "__main__":
    main(sys.argv[1:])
