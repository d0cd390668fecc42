"""Images per second of `vae-mnist` beside those of other projects: `python bench/peers/compare.py --data-root DIR`.

Each trains the same VAE on full MNIST in a process of its own, as its users run it, on the same number of threads.
First each trains for an epoch and must reach the same training loss and test negative ELBO as the plain loop. Then they
take turns: one does a block of steps while the others wait and use no CPU. Ratios are of blocks of one round.

A block of gen_dist has the steps between two evaluations of its preset and everything that a run does by default in the
loop of `gen_dist.train`: log lines, tests on 10,000 images, sample checks, pictures, checkpoints. For the others only
training counts, with their default logging and without tests. gen_dist runs twice, eager and with `--compile`, whose
compiling is done before the first block.

pythae and Lightning come with `pip install -c constraints.txt -e '.[bench]'`.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread, spread_of_ratios
from bench.measuring.temporary import temporary_directory, uninterrupted
from bench.peers import BATCH_SIZE
from bench.peers.gen_dist_run import cycle_steps
from gen_dist.cli import call_parsed, run_command
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import threads_by_default

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EPOCH_STEPS = 469
TOLERANCE = 0.02
"""Relative tolerance of losses after an epoch. Seeds of one trainer differ by 1.1 % there."""
SETTLE_SECONDS = 0.05
"""Pause before a block, since OpenMP threads of the previous process spin for a while."""
INSTALL = "pip install -c constraints.txt -e '.[bench]'"

Name = Literal["compiled", "plain", "pythae", "lightning", "limit"]
OURS, COMPILED = "ours", "compiled"


@dataclass(frozen=True)
class Peer:
    """A trainer to measure."""

    label: str
    module: str
    """Name of a module in bench/peers/ with a function `train`."""
    block_steps: int
    needs: str | None = None
    """Package of the extra `bench` that it needs."""
    bar: float | None = None
    """Least acceptable ratio of our images per second to its own."""
    learns: bool = True


PEERS = {
    OURS: Peer("gen_dist, whole run", "gen_dist_run", cycle_steps()),
    COMPILED: Peer("gen_dist --compile, whole run", "gen_dist_compiled_run", cycle_steps()),
    "plain": Peer("PyTorch's examples", "plain_loop", 100, bar=5.0),
    "pythae": Peer("pythae", "pythae_training", 100, needs="pythae", bar=2.5),
    "lightning": Peer("Lightning", "lightning_training", 100, needs="lightning", bar=5.0),
    "limit": Peer("matrix products alone", "arithmetic", 400, bar=0.75, learns=False),
}
RATIOS = {OURS: "ratio", COMPILED: "compiled_ratio"}
"""Runs that are compared with every peer, and the name of their ratios in the figures."""
MEMORY_BAR = 1.5
"""Greatest acceptable ratio of our peak memory to that of the plain loop."""


def main(
    data_root: Path,
    peers: tuple[Name, ...] = ("compiled", "plain", "pythae", "lightning", "limit"),
    rounds: int = 15,
    threads: int | None = None,
    learn_steps: int = EPOCH_STEPS,
    block_steps: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Check that all learn the same, measure them, print the figures and, as the last line, all of them in JSON.

    Args:
        data_root: directory with torchvision's MNIST; a missing one is downloaded to there.
        peers: peers to measure beside gen_dist.
        rounds: blocks of each.
        threads: of each process. None takes $GEN_DIST_THREADS, else as many as there are cores.
        learn_steps: steps after which losses are compared.
        block_steps: steps of a block. None takes as many as each needs for a few seconds.
        tolerance: relative difference of losses that is allowed.
        seed: key of weights, images and noise of each.
        out: file for the JSON as well.
    """
    for name, value in {"rounds": rounds, "learn_steps": learn_steps, "block_steps": block_steps or 1}.items():
        if value < 1:
            raise ConfigError(f"{name} {value} is less than 1")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads {threads} is less than 1")
    if not tolerance > 0:
        raise ConfigError(f"tolerance {tolerance} is not positive")
    check_out(out)
    threads = threads or threads_by_default(1)
    before = conditions() | {"threads": threads}
    chosen = installed((OURS, *dict.fromkeys(peers)))
    steps = {name: block_steps or PEERS[name].block_steps for name in chosen}
    with temporary_directory() as directory, contextlib.ExitStack() as stack:
        # Packed once here, so that missing or damaged files give one error line.
        open_dataset("mnist", str(data_root), DataConfig(cache_dir=f"{directory}/packed"), lambda _line: None)
        processes = {}
        for name in tqdm(chosen, desc="starting", leave=False):
            processes[name] = stack.enter_context(process_of(name, data_root, directory, seed, threads))
        learned = {}
        for name in tqdm([name for name in chosen if PEERS[name].learns], desc="learning", leave=False):
            learned[name] = processes[name].block(learn_steps, test=True)
        print_learned(learned, learn_steps)
        refuse_differences(learned, tolerance)
        blocks = take_turns(processes, steps, rounds)
    figures = summarize(blocks, steps)
    print_report(figures, threads)
    facts = {"rounds": rounds, "block_steps": steps, "learned": learned, "conditions": before}
    text = json.dumps({"figures": figures, **facts, "blocks": blocks})
    print_and_write(text, out)


def installed(names: Sequence[str]) -> list[str]:
    """Peers whose packages are installed. The others are named with the command that installs them."""
    found = []
    for name in names:
        needs = PEERS[name].needs
        if needs is not None and importlib.util.find_spec(needs) is None:
            print(f"{PEERS[name].label} is not measured, for {needs} is not installed: {INSTALL}", file=sys.stderr)
        else:
            found.append(name)
    return found


class Process:
    """Process of one peer, which waits at its turnstile between blocks."""

    def __init__(self, name: str, popen: subprocess.Popen[str], log: Path) -> None:
        self._name = name
        self._popen = popen
        self._log = log
        self._answer()  # the first step is done

    def block(self, steps: int, test: bool = False) -> dict[str, float]:
        """Do some steps and return the answer of turnstile.py."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer shows it
            self._popen.stdin.write(json.dumps({"steps": steps, "test": test}) + "\n")
            self._popen.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            code = self._popen.wait()
            said = self._log.read_text(errors="replace").strip().splitlines() or ["no word"]
            errors = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)]  # not its progress bar
            sys.exit(f"{PEERS[self._name].label} ended with exit code {code}: {(errors or said)[-1]}")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextlib.contextmanager
def process_of(name: str, data_root: Path, directory: Path, seed: int, threads: int) -> Iterator[Process]:
    """Context with a peer in a new interpreter and a directory of its own."""
    home = directory / name
    home.mkdir()
    module = PEERS[name].module
    words = [sys.executable, "-m", "bench.peers.process", module, str(data_root.resolve()), str(home), str(seed)]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "GEN_DIST_THREADS": str(threads)}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    log = home / "log.txt"
    with contextlib.ExitStack() as stack:
        with uninterrupted(), log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            # In its own directory: some peers write to where they are.
            popen = subprocess.Popen(words, cwd=home, env=variables, text=True, **pipes)  # type: ignore[call-overload]
            stack.callback(popen.wait)
            stack.callback(popen.kill)
        yield Process(name, popen, log)


def refuse_differences(learned: Mapping[str, Mapping[str, float]], tolerance: float) -> None:
    """Exit unless all losses are close to those of the plain loop, or to ours if it is not measured."""
    reference = "plain" if "plain" in learned else OURS
    for name, answer in learned.items():
        for key in ("loss", "test_negative_elbo"):
            value, wanted = answer[key], learned[reference][key]
            if not abs(value - wanted) <= tolerance * wanted:
                sys.exit(
                    f"{PEERS[name].label} does not learn the same: {key.replace('_', ' ')} {value:.2f} nats, but "
                    f"{wanted:.2f} of {PEERS[reference].label} (tolerance {tolerance:.1%}); their speeds do not compare"
                )


def take_turns(
    processes: Mapping[str, Process], steps: Mapping[str, int], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Blocks of each peer, one per round. Every other round is in the opposite order."""
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for turn in tqdm(range(rounds), desc="measuring", leave=False):
        for name in list(processes)[:: -1 if turn % 2 else 1]:
            time.sleep(SETTLE_SECONDS)
            blocks[name].append(processes[name].block(steps[name]))
    return blocks


def summarize(blocks: Mapping[str, Sequence[Mapping[str, float]]], steps: Mapping[str, int]) -> dict[str, Any]:
    """Figures of each peer: images per second, ratios of our runs to it by round, and peak memory.

    Ours also have the share of time outside the steps.
    """
    rates = {
        name: [steps[name] * BATCH_SIZE / block["seconds"] for block in measured] for name, measured in blocks.items()
    }
    figures: dict[str, Any] = {}
    for name, values in rates.items():
        figures[name] = {
            "images_per_second": spread(values),
            **{key: spread_of_ratios(rates[one], values) for one, key in RATIOS.items() if one in rates},
            "cpu_ms_a_step": spread([1000 * block["cpu_seconds"] / steps[name] for block in blocks[name]]),
            "peak_mib": blocks[name][-1]["peak_mib"],
        }
    # The clock of the steps runs on from block to block.
    clock = [block["step_seconds"] for block in blocks[OURS]]
    in_steps = [now - then for then, now in itertools.pairwise(clock)]
    shares = [1.0 - seconds / block["seconds"] for seconds, block in zip(in_steps, blocks[OURS][1:], strict=True)]
    figures[OURS]["outside_steps"] = spread(shares) if shares else None
    if "plain" in figures and figures[OURS]["peak_mib"] is not None:
        figures["memory_ratio"] = figures[OURS]["peak_mib"] / figures["plain"]["peak_mib"]
    return figures


def print_learned(learned: Mapping[str, Mapping[str, float]], steps: int) -> None:
    """Print the losses that each reached before the measurement."""
    print(f"{f'after {steps} steps, nats an image':30}{'training loss':>16}{'test negative ELBO':>20}{'threads':>9}")
    for name, answer in learned.items():
        figures = f"{answer['loss']:16.2f}{answer['test_negative_elbo']:20.2f}{answer['threads']:9}"
        print(f"{PEERS[name].label:30}{figures}")


def print_report(figures: Mapping[str, Any], threads: int) -> None:
    """Print the figures."""
    labels = {"ratio": "ours to it", "compiled_ratio": "compiled"}
    shown = [key for key in RATIOS.values() if key in figures[OURS]]
    head = (
        f"\n{f'batch {BATCH_SIZE}, threads: {threads}':30}{'images/s':>10}{'p20':>9}{'p80':>9}{'n':>4}{'ms a step':>11}"
    )
    ratio_heads = "".join(f"{labels[key]:>12}{'p20':>7}{'p80':>7}" for key in shown)
    print(f"{head}{'of CPU':>8}{ratio_heads}{'peak MiB':>10}  bar")
    for name, peer in PEERS.items():
        if name not in figures:
            continue
        figure = figures[name]
        rate, memory = figure["images_per_second"], figure["peak_mib"]
        rates = "".join(f"{rate[key]:{width},.0f}" for key, width in (("median", 10), ("p20", 9), ("p80", 9)))
        times = f"{1000 * BATCH_SIZE / rate['median']:11.2f}{figure['cpu_ms_a_step']['median']:8.2f}"
        ratios = "".join(
            f"{figure[key]['median']:12.2f}{figure[key]['p20']:7.2f}{figure[key]['p80']:7.2f}" for key in shown
        )
        bar = ""
        if peer.bar is not None:
            verdicts = ["met" if figure[key]["median"] >= peer.bar else "missed" for key in shown]
            bar = f"  {peer.bar:g} {verdicts[0]}" + "".join(f", compiled {verdict}" for verdict in verdicts[1:])
        most = "" if memory is None else f"{memory:,.0f}"
        print(f"{peer.label:30}{rates}{rate['n']:4}{times}{ratios}{most:>10}{bar}")
    if share := figures[OURS]["outside_steps"]:
        print(
            f"of ours, {share['median']:.1%} ({share['p20']:.1%} to {share['p80']:.1%}) is outside the steps: "
            "log lines, tests, sample checks, pictures, checkpoints"
        )
    if (ratio := figures.get("memory_ratio")) is not None:
        verdict = "met" if ratio <= MEMORY_BAR else "missed"
        print(f"peak memory of ours to that of the plain loop: {ratio:.2f}; bar: at most {MEMORY_BAR} {verdict}")


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/peers/compare.py"))
