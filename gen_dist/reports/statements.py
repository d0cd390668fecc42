"""Comparison of groups of runs in words, topic by topic, with the textbooks' claims on VAEs and GANs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gen_dist.evaluation.guide import FITTED, base_name, metric_of
from gen_dist.records.readable import readable_result
from gen_dist.reports.groups import (
    Group,
    are_apart,
    are_comparable,
    condition_of,
    data_value,
    ranked_by,
    readable_values,
)

LEAST_SEEDS = 2
"""Seeds of each model below which no textbook claim has a verdict."""


@dataclass(frozen=True)
class Statement:
    """Comparison on one topic, in words with the figures behind them."""

    topic: str
    text: str
    metrics: Sequence[str]
    """Names of the metrics that it rests on."""
    textbook: str | None = None
    """Textbook claim on VAEs and GANs; None unless both are compared and there is a claim."""
    holds: bool | None = None
    """True if the claim holds for these runs; None if undecided."""
    undecided: str | None = None
    """Reason why a claim has no verdict, as a clause; None if it has a verdict or makes no claim."""

    @property
    def verdict(self) -> str:
        """The verdict on the textbook claim in words, with the reason if there is none."""
        if self.holds is None:
            return f"no verdict: {self.undecided}"
        return "as expected" if self.holds else "not as expected"


@dataclass(frozen=True)
class _Topic:
    title: str
    metric: str
    best: str
    """Predicate that follows the label of the best group."""
    expected: str | None = None
    """The family that textbooks expect to be better."""
    textbook: str | None = None
    only_vae: str | None = None
    """Textbook claim on a metric that only VAEs should have."""


_LIKELIHOOD = "only VAEs assign a likelihood to an image"
_TOPICS = (
    _Topic("Fidelity", "fid", "draws what is nearest to real images", "gan", "GANs draw the more realistic images"),
    _Topic("Sharpness", "sharpness", "is nearest to the data", "gan", "GANs are sharp and VAEs blurry"),
    _Topic(
        "Variety",
        "recall",
        "covers the largest part of the data",
        "vae",
        "VAEs cover the data and GANs miss some of it",
    ),
    _Topic("Smoothness", "path_length", "has the smoothest latent space", "vae", "VAEs have the smoother latent space"),
    _Topic("Likelihood", "nll", "gives test images the highest likelihood", only_vae=_LIKELIHOOD),
    _Topic("Likelihood, its bound", "negative_elbo", "gives test images the best bound on it", only_vae=_LIKELIHOOD),
    _Topic(
        "Reconstruction",
        "reconstruction_error",
        "reconstructs test images best",
        only_vae="only VAEs encode images and reconstruct them",
    ),
    _Topic("Training time", "training_seconds", "trained in the least time", "vae", "VAEs train quicker than GANs"),
    _Topic("Throughput", "images_per_second", "takes most images a second", "vae", "a VAE's step is cheaper"),
)


def statements_of(groups: Sequence[Group], metrics: Sequence[str]) -> list[Statement]:
    """A statement for each topic of which any group has a metric, of samples from models' own priors; none for a single
    group."""
    said = []
    for topic in _TOPICS:
        for metric in metrics:
            if base_name(metric) == topic.metric and not metric.endswith(FITTED) and len(groups) > 1:
                said.append(_statement(topic, metric, groups))
    return said


def _statement(topic: _Topic, metric: str, groups: Sequence[Group]) -> Statement:
    ranked = ranked_by(groups, metric)
    name = metric_of(base_name(metric)).label
    figures = [readable_values(group.values(metric), metric) for group in ranked]
    of_each = [f"{figure} of {group.label}" for figure, group in zip(figures, ranked, strict=True)]
    if not are_comparable(ranked, metric):
        told = [f"{each} ({condition_of(group, metric)})" for each, group in zip(of_each, ranked, strict=True)]
        text = f"{name} {', '.join(told)}: these do not compare."
    elif len(ranked) == 1:
        text = f"{ranked[0].label} has a {name} of {figures[0]}."
    elif are_apart(ranked[0], ranked[1], metric):
        best = f"has the best {name}, which decides nothing alone" if _contradicting(metric, ranked) else topic.best
        text = f"{ranked[0].label} {best}: {name} {figures[0]} against {', '.join(of_each[1:])}."
    else:
        text = f"no clear difference between the first two in {name}: {', '.join(of_each)}."
    if ranked and metric_of(metric).better == "data" and (reference := data_value(ranked[0], metric)):
        text = f"{text[:-1]}; real images have {readable_result(reference)}."
    text += "".join(
        f" {group.label} has none: {group.reason(metric).rstrip('.')}." for group in groups if group not in ranked
    )
    if are_comparable(ranked, metric):
        text += _also(metric, ranked)
    return Statement(topic.title, text, [metric], *_textbook(topic, metric, groups))


def _also(metric: str, ranked: Sequence[Group]) -> str:
    """Qualification of a statement: the epochs behind a training time, or metrics that contradict FID."""
    if metric == "training_seconds":
        epochs = {group.label: group.values("epochs") for group in ranked}
        told = [f"{readable_values(values, 'epochs')} epochs of {label}" for label, values in epochs.items() if values]
        return f" That was for {', '.join(told)}." if told else ""
    text = ""
    for other in _contradicting(metric, ranked):
        figures = [f"{readable_values(one.values(other), other)} of {one.label}" for one in ranked_by(ranked, other)]
        text += f" {metric_of(base_name(other)).label}, on the same features, disagrees: {', '.join(figures)}."
    return text


def _contradicting(metric: str, ranked: Sequence[Group]) -> list[str]:
    """Metrics of fidelity, of as many samples, that name another group than FID as the best."""
    if base_name(metric) != "fid" or not ranked:
        return []
    found = []
    for other in (metric.replace("fid", name) for name in ("kid", "precision")):
        others = ranked_by(ranked, other)
        if len(others) > 1 and others[0] is not ranked[0] and are_apart(others[0], others[1], other):
            found.append(other)
    return found


def _textbook(topic: _Topic, metric: str, groups: Sequence[Group]) -> tuple[str | None, bool | None, str | None]:
    """Textbook claim on VAEs and GANs, its truth for the best VAE and the best GAN, and why there is no verdict."""
    claim = topic.only_vae or topic.textbook
    vaes, gans = ([group for group in groups if group.family == family] for family in ("vae", "gan"))
    if not claim or not vaes or not gans:
        return None, None, None
    if reason := _too_little([*vaes, *gans]):
        return claim, None, reason
    if topic.only_vae:
        holds = all(one.values(metric) for one in vaes) and not any(one.values(metric) for one in gans)
        return claim, holds, None
    vaes, gans = ranked_by(vaes, metric), ranked_by(gans, metric)
    if not vaes or not gans:
        return None, None, None
    better, worse = (vaes[0], gans[0]) if topic.expected == "vae" else (gans[0], vaes[0])
    if not are_comparable([better, worse], metric):
        return claim, None, "the figures do not compare"
    if against := _contradicting(metric, ranked_by([better, worse], metric)):
        names = " and ".join(metric_of(base_name(name)).label for name in against)
        return claim, None, f"{names} and {metric_of(base_name(metric)).label} disagree"
    if are_apart(better, worse, metric):
        return claim, True, None
    return (claim, False, None) if are_apart(worse, better, metric) else (claim, None, "no clear difference")


def _too_little(groups: Sequence[Group]) -> str | None:
    """Reason why these runs decide no claim: less than a whole training, a collapse, or a single seed."""
    if short := [f"{group.label} is {caveat}" for group in groups if (caveat := group.caveat)]:
        return "; ".join(short)
    if collapsed := [f"{group.label} shows {one.name}" for group in groups for one in group.collapses]:
        return "; ".join(collapsed)
    single = [group.label for group in groups if len({run.config.seed for run in group.runs}) < LEAST_SEEDS]
    return f"one seed of {' and '.join(single)}, where a claim needs {LEAST_SEEDS} or more" if single else None
