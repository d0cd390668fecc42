"""All that only a GPU shows, in one report: its tests, the kernels' times, training throughput. `make gpu` runs it."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.conditions import conditions
from gen_dist.cli import run_command
from gen_dist.errors import ConfigError
from gen_dist.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent
TRAINED = {
    "float32": ("--precision", "float32"),
    "bf16": ("--precision", "bf16"),
    "bf16, compiled": ("--precision", "bf16", "--compile"),
}
"""Ways in which each preset is trained."""
COLOUR = ("--data", "synthetic", "--channels", "3")
"""In place of colour images that would have to be downloaded: a step takes as long with these."""


def main(out: Path = Path("gpu-report.md"), steps: int = 400) -> None:
    """Run the GPU tests and benchmarks, print them, and write the report; exit with 1 if a part failed.

    Args:
        out: Markdown file to write.
        steps: optimizer steps of each training.
    """
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; run this on a machine with one")
    facts = conditions() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    parts = [f"# GPU report\n\n{json.dumps(facts)}"]
    failed = []
    for title, command in (
        ("Tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]),
        ("Kernels", [sys.executable, "bench/kernels.py", "--device", "cuda", "--large"]),
    ):
        code, output = run(command)
        failed += [title] if code else []
        parts.append(f"## {title}\n\n{output if output.startswith('|') else fenced(output)}")
    code, table = training_table(steps)
    failed += ["Training"] if code else []
    parts.append(f"## Training\n\n{table}")
    out.write_text("\n\n".join(parts) + "\n")
    print(out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def fenced(output: str) -> str:
    """Output as it stands, in Markdown."""
    return f"```\n{output}\n```"


def run(command: list[str]) -> tuple[int, str]:
    """Exit code of a command at the repository's root, and what it printed, shown as it comes."""
    print(f"$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines).strip()


def training_table(steps: int) -> tuple[int, str]:
    """How many trainings failed, and images per second of every preset in every way, as Markdown."""
    failures = 0
    rows = [f"| preset, {steps} steps | {' | '.join(TRAINED)} |", f"|---|{'---|' * len(TRAINED)}"]
    with tempfile.TemporaryDirectory() as directory:
        for preset, config in PRESETS.items():
            cells = []
            data = () if config.data == "mnist5k" else (*COLOUR, "--image-size", str(config.packing.image_size or 32))
            for options in TRAINED.values():
                run_directory = Path(directory) / f"{preset}-{time.monotonic_ns()}"
                words = ["--device", "cuda", "--steps", str(steps), "--run-dir", str(run_directory), *data, *options]
                code, _ = run([sys.executable, "launch/train.py", preset, *words])
                failures += code != 0
                cells.append("failed" if code else f"{images_per_second(run_directory):,.0f} images/s")
            rows.append(f"| `{preset}` | {' | '.join(cells)} |")
    return failures, "\n".join(rows)


def images_per_second(run_directory: Path) -> float:
    """The median over the second half of a run's log lines: compiling and the first steps do not count."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    rates = [record["images_per_second"] for record in map(json.loads, lines) if "images_per_second" in record]
    later = sorted(rates[len(rates) // 2 :])
    return float(later[len(later) // 2])


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
