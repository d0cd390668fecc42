"""What a run records and shows while it trains: metrics.jsonl, a progress bar or plain lines, and wandb.

One process of a run holds a `Tracker`. metrics.jsonl has one JSON object a line: `step`, `images_seen`,
`images_per_second` (absent where no image was trained on since the line before) and scalars such as `train/loss` and
`test/loss`. JSON has no NaN and no infinity, so a scalar that is not finite is written as null; pandas reads it as NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, get_args

from gen_dist.config import TrainConfig, WandbMode
from gen_dist.errors import CheckpointError, ConfigError

METRICS_FILE = "metrics.jsonl"

BAR_REFRESH_SECONDS = 0.1
LEAST_BAR_CELLS = 10

# Longer waits cannot help a run that must not stop for wandb; what was not sent stays on disk for `wandb sync`.
WANDB_INIT_SECONDS = 30.0
WANDB_FINISH_SECONDS = 60.0

_NOT_A_LOSS = frozenset({"learning_rate", "gradient_norm", "kl_weight"})
_PACKAGES = ("torch", "torchvision", "accelerate", "triton", "numpy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a process that dies half-way leaves what stood there before.

    Text becomes UTF-8. The file is on disk (fsync) before it takes its name.

    Raises:
        OSError: the disk is full, or the directory is missing or not writable.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")  # one fixed name, so that killed runs pile nothing up
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in file order. A torn last line, as a killed process leaves it, is left out.

    Raises:
        CheckpointError: the file cannot be read, or a line before the last is no record.
    """
    return [record for _, record in _numbered_records(path)]


def _numbered_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line, without its line end, and the record in it."""
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append((line, record))
        elif number < len(lines):
            raise CheckpointError(
                f"{path}: line {number} is no record of metrics; remove that line, or start over with --fresh"
            )
    return records


def environment() -> dict[str, Any]:
    """What a run ran on, for environment.json: versions, hardware, git commit and command line.

    Memory is in GiB. What is absent is None: a package that is not installed, the commit of code outside a checkout,
    a count that the operating system does not tell. Holds no environment variable and no host name.
    """
    import psutil
    import torch

    from gen_dist import __version__

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"gen_dist": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "memory_gib": _gib(psutil.virtual_memory().total),
        },
        "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.total_memory)} for gpu in gpus],
        "torch_threads": torch.get_num_threads(),
        "git": _git_state(),
        "command": list(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    elif sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this file is tracked in. An installed copy inside another repository has none."""
    directory = str(Path(__file__).resolve().parent)
    if _output_of("git", "-C", directory, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _output_of("git", "-C", directory, "rev-parse", "HEAD")
    changes = _output_of("git", "-C", directory, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _output_of(*command: str) -> str | None:
    """What a command prints; None where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Tracker:
    """Records and shows one run. A context manager: leaving it closes the file, the bar and wandb.

    Nothing that it shows can stop a run: a terminal that goes away or a wandb that fails only ends the showing.

    Args:
        run_path: the run's directory; made if it is missing.
        config: decides the number of steps and the wandb mode (`config.wandb`, else $WANDB_MODE, else disabled).
        start_step: steps done before. 0 starts metrics.jsonl afresh; else its lines after this step, which a run that
            was killed after its last checkpoint has written, and a torn last line are dropped.
        images_per_step: the global batch size.
        wandb_id: the run's id on wandb; the same id when resumed continues the same curves.
        stream: where to show; None is sys.stderr. A terminal gets a live bar, anything else plain lines.

    Raises:
        ConfigError: $WANDB_MODE is no mode, wandb is not installed, or mode online has no valid API key.
        CheckpointError: metrics.jsonl is damaged or cannot be written.
    """

    def __init__(
        self,
        run_path: Path,
        config: TrainConfig,
        *,
        start_step: int,
        images_per_step: int,
        wandb_id: str,
        stream: TextIO | None = None,
    ) -> None:
        self._steps = config.steps
        self._images_per_step = images_per_step
        self._path = run_path / METRICS_FILE
        self._exit_code = 0
        self._display = _Display(sys.stderr if stream is None else stream, config.steps)
        mode = _wandb_mode(config.wandb)
        try:
            run_path.mkdir(parents=True, exist_ok=True)
            if start_step and self._path.exists():
                _drop_after(self._path, start_step)
        except OSError as error:
            raise CheckpointError(f"cannot write to {run_path}: {error.strerror}") from None
        self._wandb = None if mode == "disabled" else _Wandb(mode, run_path, config, wandb_id, self.note)
        try:
            self._file = open(self._path, "a" if start_step else "w", encoding="utf-8")  # noqa: SIM115 (kept open)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from None

        self._started = time.perf_counter()
        self._paused_seconds = 0.0
        self._pause_started: float | None = None
        self._counted_step = start_step
        self._counted_seconds = 0.0
        self._eta_origin: tuple[int, float] | None = None
        self._images_per_second: float | None = None
        self._losses: list[str] = []
        self._display.start(start_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit_code = 0 if kind is None else 1
        self.close()

    def advance(self, step: int) -> None:
        """Say that `step` is done, for the bar between two logs. Costs well under 1 us; call it after every step.

        The clocks of throughput and ETA start at the first call, so that compiling or the first step's set-up does
        not count.
        """
        if self._eta_origin is None:
            self._eta_origin = (step, time.perf_counter())
            self._counted_step, self._counted_seconds = step, self.training_seconds
        if self._display.due():
            self._display.move(step, self._progress(step))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in this block, such as evaluating or writing a checkpoint, does not count in `images_per_second`."""
        if self._pause_started is not None:  # within another pause, which counts
            yield
            return
        self._pause_started = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - self._pause_started
            self._pause_started = None

    @property
    def training_seconds(self) -> float:
        """Wall time since this tracker was made, without pauses."""
        now = time.perf_counter() if self._pause_started is None else self._pause_started
        return now - self._started - self._paused_seconds

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, show it, and send it to wandb.

        Args:
            step: optimizer steps done.
            scalars: values by name, as in `train/loss`. `images_per_second`, if among them, replaces the figure
                measured since the last log.

        Raises:
            CheckpointError: metrics.jsonl cannot be written, as on a full disk.
        """
        values = {name: float(value) for name, value in scalars.items()}
        rate = values.pop("images_per_second", None)
        rate = self._measure(step) if rate is None else rate
        record: dict[str, Any] = {"step": step, "images_seen": step * self._images_per_step}
        if rate is not None:
            self._images_per_second = rate
            values = {"images_per_second": rate, **values}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free some space, then run the same command to go on"
            ) from None
        self._show(step, values)
        if self._wandb is not None:
            self._wandb.log(step, {"images_seen": record["images_seen"], **values})

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Send image files to wandb by name, such as `samples`; without wandb, nothing is done."""
        if self._wandb is not None:
            self._wandb.pictures(step, pictures)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._display.line(text)

    def close(self) -> None:
        """End the bar, close metrics.jsonl and finish the wandb run. Closing twice is closing once."""
        with contextlib.suppress(OSError):  # what could not be written, log() has reported
            self._file.close()
        self._display.close()
        if self._wandb is not None:
            self._wandb.finish(self._exit_code)

    def _measure(self, step: int) -> float | None:
        """Images per second since the last measurement, pauses left out; None if no step was made."""
        images = (step - self._counted_step) * self._images_per_step
        seconds = self.training_seconds - self._counted_seconds
        if images <= 0 or seconds <= 0:
            return None
        self._counted_step, self._counted_seconds = step, self.training_seconds
        if self._eta_origin is None:
            self._eta_origin = (step, time.perf_counter())
        return round(images / seconds, 1)

    def _show(self, step: int, values: dict[str, float]) -> None:
        losses = _brief(values, "train/")
        if losses or "images_per_second" in values:
            self._losses = losses
            self._display.progress(step, self._progress(step))
        tests = _brief(values, "test/")
        if tests:
            self._display.line("  ".join([f"step {step}/{self._steps}  test", *tests]))

    def _progress(self, step: int) -> list[str]:
        """What to show of the run's state; the losses, which a narrow terminal drops first, are the middle part."""
        rate = [] if self._images_per_second is None else [f"{self._images_per_second:,.0f} images/s"]
        seconds = self._seconds_left(step)
        eta = [] if seconds is None else [f"ETA {_clock(seconds)}"]
        return [f"step {step}/{self._steps}", *rate, *eta, *self._losses]

    def _seconds_left(self, step: int) -> float | None:
        """From the wall time of this process's steps, with its evaluations and checkpoints, without its start."""
        if self._eta_origin is None:
            return None
        first_step, started = self._eta_origin
        if step >= self._steps:
            return 0.0
        if step <= first_step:
            return None
        return (time.perf_counter() - started) / (step - first_step) * (self._steps - step)


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of metrics.jsonl up to `step`."""
    text = "".join(line + "\n" for line, record in _numbered_records(path) if record["step"] <= step)
    write_atomically(path, text)


def _brief(values: Mapping[str, float], prefix: str) -> list[str]:
    """Losses for the eye: `loss 107.93`."""
    names = {name: name.removeprefix(prefix) for name in values if name.startswith(prefix)}
    return [f"{short} {readable_number(values[name])}" for name, short in names.items() if short not in _NOT_A_LOSS]


def readable_number(value: float) -> str:
    """A loss or rate for the eye: 24,310, 107.93, 0.0120, 9.1e-05, nan."""
    size = abs(value)
    if not math.isfinite(value) or size >= 10_000:
        return f"{value:,.0f}"
    if size >= 1 or size == 0:
        return f"{value:.2f}"
    return f"{value:.4f}" if size >= 0.01 else f"{value:.1e}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Display:
    """A live bar on a terminal, plain lines elsewhere, nothing once the stream is gone."""

    def __init__(self, stream: TextIO | None, steps: int) -> None:
        self._stream = stream
        self._steps = steps
        self._bar: Any = None
        self._shown_at = -math.inf
        self._first_shown_at: float | None = None

    def start(self, start_step: int) -> None:
        with self._end_if_stream_is_gone():
            if self._stream is not None and self._stream.isatty():
                self._bar = _progress_bar(self._stream, self._steps, start_step)

    def due(self) -> bool:
        """Whether a live bar has not moved for a while."""
        return self._bar is not None and time.perf_counter() - self._shown_at >= BAR_REFRESH_SECONDS

    def progress(self, step: int, parts: list[str]) -> None:
        """Show the state: on the bar if that is due, else as a line. The first and the last are always shown."""
        last = step >= self._steps
        if self._bar is not None:
            if last or self.due():
                self.move(step, parts)
            return
        now = time.perf_counter()
        if self._first_shown_at is None:
            self._first_shown_at = now
        # A second apart at first, further apart as hours pass: an overnight run's log stays short.
        apart = max(1.0, (now - self._first_shown_at) / 100)
        if last or now - self._shown_at >= apart:
            self._shown_at = now
            self.line("  ".join(parts))

    def move(self, step: int, parts: list[str]) -> None:
        """Move the live bar."""
        with self._end_if_stream_is_gone():
            columns = self._bar.format_dict["ncols"]
            room = columns - len("100%|| ") - LEAST_BAR_CELLS
            while len(parts) > 1 and len("  ".join(parts)) > room:
                parts = parts[:-1]
            self._bar.set_description_str("  ".join(parts), refresh=False)
            self._bar.n = min(step, self._steps)
            self._bar.refresh()
            self._shown_at = time.perf_counter()

    def line(self, text: str) -> None:
        with self._end_if_stream_is_gone():
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            elif self._stream is not None:
                self._stream.write(text + "\n")
                self._stream.flush()

    def close(self) -> None:
        with self._end_if_stream_is_gone():
            if self._bar is not None:
                self._bar.close()
        self._bar = None

    @contextlib.contextmanager
    def _end_if_stream_is_gone(self) -> Iterator[None]:
        """A hung-up terminal or a closed pipe must not end the training; metrics.jsonl has it all."""
        try:
            yield
        except (OSError, ValueError):  # ValueError is what a closed file object raises
            self._stream = None
            self._bar = None


def _progress_bar(stream: TextIO, steps: int, start_step: int) -> Any:
    from tqdm import tqdm

    # tqdm's default lock makes a multiprocessing semaphore, and its monitor a thread: neither is needed by one bar.
    bar_class: Any = type("ProgressBar", (tqdm,), {"monitor_interval": 0})
    bar_class.set_lock(threading.RLock())
    known_size = os.get_terminal_size(stream.fileno()).columns > 0  # some containers' terminals say 0 x 0
    return bar_class(
        total=steps,
        initial=start_step,
        file=stream,
        ncols=None if known_size else 80,
        dynamic_ncols=known_size,
        desc=f"step {start_step}/{steps}",
        bar_format="{percentage:3.0f}%|{bar}| {desc}",
    )


def _wandb_mode(configured: WandbMode | None) -> WandbMode:
    wanted = configured or os.environ.get("WANDB_MODE") or "disabled"
    modes: tuple[WandbMode, ...] = get_args(WandbMode)
    for mode in modes:
        if mode == wanted:
            return mode
    raise ConfigError(f"WANDB_MODE {wanted!r} is not one of {', '.join(modes)}")


class _Wandb:
    """A wandb run that warns once and goes silent when wandb fails, whatever the failure."""

    def __init__(
        self, mode: WandbMode, run_path: Path, config: TrainConfig, wandb_id: str, note: Callable[[str], None]
    ) -> None:
        self._note = note
        self._run: Any = None
        self._directory = run_path / "wandb"
        try:
            import wandb
        except ImportError:
            raise ConfigError(f"wandb {mode} needs the wandb package; install it, or use --wandb disabled") from None
        quiet: dict[str, Any] = {"silent": True, "console": "off"}
        try:
            wandb.setup(wandb.Settings(**quiet))  # silent from here on: wandb neither prints nor asks for a key
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "gen_dist"),
                name=run_path.name,
                dir=str(run_path),
                id=wandb_id,
                resume="allow",
                reinit="create_new",
                config=dataclasses.asdict(config),
                mode=mode,
                settings=wandb.Settings(**quiet, init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"wandb {mode}: {_one_line(error)} Run `wandb login`, set WANDB_API_KEY, or use --wandb offline"
            ) from None
        except Exception as error:  # a third party's service: no failure of it may stop a training
            self._give_up("did not start", error)
            return
        if mode == "online":
            note(f"wandb: {self._run.url}")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # see above
            self._give_up("failed", error)

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        if self._run is None:
            return
        import wandb

        try:
            self._run.log({name: wandb.Image(str(path)) for name, path in pictures.items()}, step=step)
        except Exception as error:  # see above
            self._give_up("failed", error)

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        offline = self._run.settings.mode == "offline"
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # see above
            self._give_up("did not finish", error)
            return
        self._run = None
        if offline:
            self._note(f"wandb: offline run kept in {self._directory}; `wandb sync` uploads it")

    def _give_up(self, what: str, error: Exception) -> None:
        import wandb

        self._run = None
        self._note(f"warning: wandb {what}, the run goes on without it: {_one_line(error)}")
        # A dead service makes wandb print a traceback at exit unless it is torn down here.
        with contextlib.suppress(Exception):
            wandb.teardown()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
