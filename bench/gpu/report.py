"""Report of everything that needs a GPU: its tests, the kernels' times, steps of presets. `make gpu` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from gen_dist.cli import run_command
from gen_dist.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PARTS = {
    "Tests of kernels": ("-m", "pytest", "-m", "gpu", "-q", "tests/kernels"),
    "Group normalization": ("bench/gpu/group_norm.py", "--device", "cuda"),
    "Kernels": ("bench/gpu/kernels.py", "--device", "cuda", "--large"),
    "Steps": ("bench/gpu/steps.py",),
    "Other tests": ("-m", "pytest", "-m", "gpu", "-q", "--ignore", "tests/kernels"),
}
"""Arguments of Python for each part: what no CPU can tell comes first."""


def main(out: Path = Path("gpu-report.md")) -> None:
    """Run the GPU tests and benchmarks, print them, and write the report as each ends; exit with 1 if a part failed.

    Args:
        out: Markdown file to write.
    """
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; run this on a machine with one")
    facts = conditions() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    parts = [f"# GPU report\n\n{json.dumps(facts)}"]
    failed = []
    for title, words in PARTS.items():
        code, output = run([sys.executable, *words])
        failed += [title] if code else []
        parts.append(f"## {title}\n\n{output if output.startswith('|') else fenced(output)}")
        out.write_text("\n\n".join(parts) + "\n")  # what has ended is kept if the machine is taken away
    print(out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def fenced(output: str) -> str:
    """Output as a block of Markdown."""
    return f"```\n{output}\n```"


def run(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command at the repository's root; the output is shown as it comes."""
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


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
