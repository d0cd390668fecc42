"""Progress of a run on the screen: a live bar or plain lines, with the figures that fit."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from gen_dist.config import ObjectiveConfig
from gen_dist.config.recorded import MEASURED
from gen_dist.records.readable import readable_number, readable_share

BAR_REFRESH_SECONDS = 0.1
LEAST_BAR_CELLS = 10
LEAST_SURE_RATIO = 0.2
"""Sureness of the samples' classes, relative to test images, below which they are not counted on the screen."""

_NOT_A_LOSS = frozenset({"learning_rate", "gradient_norm", "beta2", "penalty_weight", "ada_probability"})
_ACCURACIES = {"accuracy_real": "real", "accuracy_fake": "fake", "accuracy": "pairs"}


class Display:
    """A live bar on a terminal, plain lines elsewhere, nothing once the stream is gone."""

    def __init__(self, stream: TextIO | None, steps: int) -> None:
        """Show nothing before `start`.

        Args:
            stream: where to show. None shows nothing.
            steps: optimizer steps of the whole run.
        """
        self._stream = stream
        self._steps = steps
        self._bar: Any = None
        self._shown_at = -math.inf
        self._first_shown_at: float | None = None

    def start(self, start_step: int) -> None:
        """On a terminal, show a bar at `start_step`."""
        with self._end_if_stream_is_gone():
            if self._stream is not None and self._stream.isatty():
                self._bar = _progress_bar(self._stream, self._steps, start_step)

    def due(self) -> bool:
        """True if there is a live bar that has not moved for a while."""
        return self._bar is not None and time.perf_counter() - self._shown_at >= BAR_REFRESH_SECONDS

    def progress(self, step: int, parts: list[str]) -> None:
        """Show the state on the bar, or as a line, if that is due. The first and the last one are always shown."""
        last = step >= self._steps
        if self._bar is not None:
            if last or self.due():
                self.move(step, parts)
            return
        now = time.perf_counter()
        if self._first_shown_at is None:
            self._first_shown_at = now
        # One second apart at first, more as hours pass, so that the log of an overnight run stays short.
        apart = max(1.0, (now - self._first_shown_at) / 100)
        if last or now - self._shown_at >= apart:
            self._shown_at = now
            self.line("  ".join(parts))

    def move(self, step: int, parts: list[str]) -> None:
        """Move the live bar. A narrow terminal shows only the first of the `parts`."""
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
        """Print a line, above the bar if there is one."""
        with self._end_if_stream_is_gone():
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            elif self._stream is not None:
                self._stream.write(text + "\n")
                self._stream.flush()

    def close(self) -> None:
        """End the bar; its last state stays on the terminal."""
        with self._end_if_stream_is_gone():
            if self._bar is not None:
                self._bar.close()
        self._bar = None

    @contextlib.contextmanager
    def _end_if_stream_is_gone(self) -> Iterator[None]:
        """Stop showing if the terminal hung up, the pipe was closed, or tqdm fails. The training goes on."""
        try:
            yield
        except Exception:  # a TQDM_ variable of the environment can have tqdm fail in any way
            self._stream = None
            self._bar = None


def _progress_bar(stream: TextIO, steps: int, start_step: int) -> Any:
    from tqdm import tqdm

    # A single bar needs neither the multiprocessing semaphore of tqdm's default lock nor its monitor thread.
    bar_class: Any = type("ProgressBar", (tqdm,), {"monitor_interval": 0})
    bar_class.set_lock(threading.RLock())
    try:
        known_size = os.get_terminal_size(stream.fileno()).columns > 0  # some containers have terminals of 0 x 0
    except OSError:  # a terminal on another host
        known_size = False
    return bar_class(
        total=steps,
        initial=start_step,
        file=stream,
        ncols=None if known_size else int(os.environ.get("COLUMNS") or 80),
        dynamic_ncols=known_size,
        desc=f"step {start_step}/{steps}",
        bar_format="{percentage:3.0f}%|{bar}| {desc}",
    )


def brief_losses(values: Mapping[str, float | Sequence[float]], prefix: str, objective: ObjectiveConfig) -> list[str]:
    """Format the losses among `values` whose names start with `prefix`: `loss 107.93`.

    If several phases have logs, such as `discriminator/loss`, only their losses are shown: `D 1.32`. Accuracies of the
    discriminator follow: `real 71%` and `fake 80%` of images, or `pairs 71%` of pairs of a real and a generated image.
    """
    scalars = {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and not isinstance(value, Sequence)
    }
    losses, accuracies = [], []
    for name, value in scalars.items():
        phase, _, last = name.rpartition("/")
        if last in _ACCURACIES and phase:
            accuracies.append(f"{_ACCURACIES[last]} {readable_share(value)}")
        elif phase and last == "loss":
            losses.append(f"{objective.phase_names.get(phase, phase)} {readable_number(value)}")
        elif not phase and last not in _NOT_A_LOSS:
            losses.append(f"{short_name(last, objective)} {readable_number(value)}")
    return losses + accuracies


def short_name(name: str, objective: ObjectiveConfig) -> str:
    """Name of a figure on the screen: `reconstruction` of `nll`, which is not a likelihood of the image."""
    known = objective.figure_names.get(name)
    return known.short or known.title if known else name


def brief_use(values: Mapping[str, float]) -> list[str]:
    """Format the figures of the machine's use: `0.031 TFLOP/s (35%)`, `peak 0.72 GiB`."""
    shown = []
    if (rate := values.get("tflops_per_second")) is not None:
        share = values.get("fraction_of_peak")
        shown.append(f"{readable_number(rate)} TFLOP/s" + ("" if share is None else f" ({readable_share(share)})"))
    if (memory := values.get("peak_memory_mib")) is not None:
        shown.append(f"peak {memory / 1024:.2f} GiB")
    return shown


def brief_measured(values: Mapping[str, float | Sequence[float]]) -> list[str]:
    """Format the metrics of `evaluate_metrics` among `values` that are single numbers: `fid_1k 12.3`."""
    return [
        f"{name.removeprefix(MEASURED)} {readable_number(value)}"
        for name, value in values.items()
        if name.startswith(MEASURED) and not name.endswith("_data") and isinstance(value, int | float)
    ]


def brief_checks(values: Mapping[str, float | Sequence[float]]) -> list[str]:
    """Format the sample checks among `values`: `diversity 0.97`, `classes 10/10 (sure 0.71)`, `labels 93%`.

    How sure the classes are is relative to test images. They are not counted where the classifier hardly knows any.
    """
    shown = []
    ratio, found = values.get("samples/diversity_ratio"), values.get("samples/classes_found")
    shares, accuracy = values.get("samples/class_shares"), values.get("samples/label_accuracy")
    if isinstance(ratio, float):
        shown.append(f"diversity {ratio:.2f}")
    sure = values.get("samples/sure_ratio")
    if isinstance(found, float) and isinstance(shares, Sequence):
        is_sure = isinstance(sure, float) and sure >= LEAST_SURE_RATIO
        shown.append(f"classes {found:.0f}/{len(shares)} (sure {sure:.2f})" if is_sure else "classes unsure")
    if isinstance(accuracy, float):
        shown.append(f"labels {readable_share(accuracy)}")
    return shown
