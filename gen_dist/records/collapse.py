"""Signs of a collapsed training in the figures of metrics.jsonl, for the screen and for reports.

Thresholds are far from what the first 300 steps of every preset for MNIST show; figures below are of such runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_STEPS = 100
"""Steps before which nothing counts as a sign: networks are still near their initial weights."""
PATIENCE = 3
COLLAPSED_KL_NATS = 0.1
"""The 20 latents of `vae-mnist` have 25 nats; with a KL term of 20 times the weight, which leaves one, 0.3."""
ALL_ALIKE = 0.05
"""Diversity of the samples, times that of test images. `wgan-gp-mnist` has 0.13 at step 300, a collapsed VAE 0.01."""
ONE_ANSWER, SEPARATED = 0.002, 0.998
"""Shares of images, or of pairs, that the discriminator classifies correctly."""
OUTERMOST = 0.5
"""Mean of the shares of generated images with scores below -9 and of real images with scores above 9, the outermost
bins. `gan-mnist` has none, and 0.9 with a hundred times its learning rate."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Sign:
    name: str
    meaning: str
    holds: Callable[[Record], bool | None]
    """True if a record has the sign, None if it lacks the figures."""
    patience: int = PATIENCE
    """Consecutive records with the sign before it is told, except at the last step."""


@dataclass(frozen=True)
class Collapse:
    """A sign that held for several records."""

    name: str
    since: int
    """Step of the first record with it."""
    text: str
    """One line: what it is, its figures and the way out."""


def _figure(record: Record, name: str) -> float | None:
    """Value of a figure of any phase in the training's logs; None if the record has none or it was not finite."""
    found = [value for key, value in record.items() if key.startswith("train/") and key.rpartition("/")[2] == name]
    return found[0] if found and isinstance(found[0], int | float) else None


def _posterior_collapsed(record: Record) -> bool | None:
    kl = _figure(record, "kl")
    return None if kl is None else kl < COLLAPSED_KL_NATS


def _gives_one_answer(record: Record) -> bool | None:
    real, fake, pairs = (_figure(record, name) for name in ("accuracy_real", "accuracy_fake", "accuracy"))
    if pairs is not None:
        return pairs <= ONE_ANSWER
    if real is None or fake is None:
        return None
    return min(real, fake) <= ONE_ANSWER and max(real, fake) >= SEPARATED


def _scores_saturated(record: Record) -> bool | None:
    real, fake = record.get("scores/real"), record.get("scores/fake")
    has_zero_point = _figure(record, "accuracy_real") is not None  # scores of pairs have no scale
    if not has_zero_point or not isinstance(real, list) or not isinstance(fake, list) or not real or not fake:
        return None
    if real[-1] is None or fake[0] is None:
        return None
    return bool((real[-1] + fake[0]) / 2 >= OUTERMOST)


def _all_alike(record: Record) -> bool | None:
    ratio = record.get("samples/diversity_ratio")
    return ratio < ALL_ALIKE if isinstance(ratio, int | float) else None


_SIGNS = (
    _Sign(
        "posterior collapse",
        f"the KL term is below {COLLAPSED_KL_NATS} nats, so that no latent says anything of an image; lower --beta or "
        "raise --kl-warmup-steps",
        _posterior_collapsed,
    ),
    _Sign(
        "dead discriminator",
        "it gives real and generated images the same answer, so that the generator learns nothing; lower "
        "--learning-rate or change the discriminator's normalization",
        _gives_one_answer,
    ),
    _Sign(
        "saturated scores",
        "half of the discriminator's scores or more are beyond 9, where its sigmoid is flat; lower --learning-rate or "
        "raise --instance-noise",
        _scores_saturated,
    ),
    _Sign(
        "collapsed generator",
        f"its samples are nearly all alike, with less than {ALL_ALIKE:.0%} of the diversity of test images; lower "
        "--learning-rate or choose another seed",
        _all_alike,
        patience=2,  # evaluations are rare
    ),
)


class CollapseWatch:
    """Follows the records of a run, and tells each sign once when it begins, and once when it ends."""

    def __init__(self, last_step: int, records: Iterable[Record] = ()) -> None:
        """Take up where earlier starts of the run left off.

        Args:
            last_step: of the whole run.
            records: of earlier starts.
        """
        self._last_step = last_step
        self._streaks: dict[str, tuple[int, int]] = {}
        """By sign: the step of the first of its consecutive records, and their number."""
        self._told: dict[str, Collapse] = {}
        for record in records:
            self.see(record)

    @property
    def present(self) -> list[Collapse]:
        """Signs that still hold."""
        return list(self._told.values())

    def see(self, record: Record) -> list[str]:
        """Take the next record; returns a line for each sign that begins or ends with it."""
        step = record["step"]
        lines = []
        for sign in _SIGNS:
            holds = sign.holds(record) if step >= LEAST_STEPS else None
            if holds is False:
                self._streaks.pop(sign.name, None)
                if self._told.pop(sign.name, None):
                    lines.append(f"{sign.name} ended at step {step:,}")
            if not holds:
                continue
            since, count = self._streaks.get(sign.name, (step, 0))
            self._streaks[sign.name] = since, count + 1
            if sign.name not in self._told and (count + 1 >= sign.patience or step >= self._last_step):
                lines.append(f"{sign.name} since step {since:,}: {sign.meaning}")
                self._told[sign.name] = Collapse(sign.name, since, lines[-1])
        return lines
