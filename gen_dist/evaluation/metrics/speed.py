"""Figures of the training run beside the metrics. They are read from the run, not measured."""

from gen_dist.evaluation.metric import Metric, register

register(
    Metric(
        name="training_seconds",
        label="training time",
        group="run",
        better="less",
        meaning="Wall time of the steps, without tests, pictures and checkpoints.",
        unit="s",
    )
)
register(
    Metric(
        name="images_per_second",
        label="throughput",
        group="run",
        better="more",
        meaning="Training images a second, mean over the run.",
        unit="images/s",
    )
)
register(Metric(name="epochs", label="epochs", group="run", better=None, meaning="Passes over the training images."))
