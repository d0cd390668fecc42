"""Commands of gen_dist that the system fails under, and the states of the files that each starts from."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from gen_dist.data.shards.writing import Sample, tar_shard


class Scenario(NamedTuple):
    """A command, and the state of the files that it starts from."""

    words: Sequence[str]
    """Words after `gen-dist`."""
    state: str
    prints: bool = False
    """True if the result is what it prints, not what it writes."""


class State(NamedTuple):
    """Files as a command and a change leave them, made from another state."""

    before: str | None
    command: str | None = None
    """Scenario whose command runs first."""
    change: Callable[[Path], object] = lambda _root: None
    """Function of the root that then changes files."""


PLUGIN = """
from dataclasses import dataclass, replace
from typing import Literal

from gen_dist.config import MlpConfig, networks
from gen_dist.evaluation.metric import Metric, register
from gen_dist.presets import add_preset, get_preset


@networks.register
@dataclass(frozen=True)
class MineConfig(MlpConfig):
    kind: Literal["mine"] = "mine"


def brightness(context):
    return {"brightness": float(context.sampled.images.double().mean())}


add_preset("mine", replace(get_preset("vae-mnist"), network=MineConfig()), "ours on a network of the plug-in")
register(
    Metric(
        name="brightness",
        label="brightness",
        group="pixels",
        better="data",
        meaning="Mean grey level of the samples.",
        needs=("samples",),
        counts="samples",
        measure=brightness,
    )
)
"""


def scenarios_of(root: Path) -> dict[str, Scenario]:
    """Commands on the files below a directory, by name."""
    run, out, other = str(root / "run"), root / "out", str(root / "other")
    places = ["--run-dir", run, "--cache-dir", str(root / "cache")]
    short = ["--steps", "6", "--checkpoint-every", "2", "--sample-every", "3", "--evaluate-every", "3"]
    tiny = [*short, "--log-every", "3", "--hidden-sizes", "16", "--latent-dim", "2", "--global-batch-size", "64"]
    tiny += places
    train = ["train", "vae-mnist", *tiny, "--ema-decay", "0.9"]
    images = f"folder:{root / 'images'}"
    folder = ["--data", images, "--global-batch-size", "4", "--steps", "2"]
    plugged = ["train", "mine", "--plugin", str(root / "mine.py"), *tiny]
    small = ["--feature-maps", "4", "8", "--blocks", "1", "--groups", "2", "--latent-dim", "2"]
    latent = ["train", "kl-mnist", *small, "--learning-rate", "0.01", *folder, "--image-size", "16", *short, *places]
    quick = ["--samples", "100", "--nll-samples", "2", "--nll-images", "5"]
    page = ["--no-step-times", "--no-evaluate", "--out", str(out / "report.html")]
    wide = ["--image-size", "24x16", "--fit", "pad"]
    packing = [*wide, "--cache-dir", str(root / "cache")]
    animation = ["--count", "2", "--columns", "2", "--stops", "2", "--frames", "2"]
    some_image = str(root / "images" / "a" / "0.png")
    shards = ["--data", f"shards:{root / 'shards'}/{{000..001}}.tar", "--image-size", "16", "--global-batch-size", "4"]
    kept = ["--keep-checkpoints", "1", "--keep-best", "nll", "--evaluate-metrics", "diversity"]
    sheet = str(out / "samples.png")
    toy = ["--data", f"toy:{root / 'digits.toy'}"]
    return {
        "pack": Scenario(["train", "vae-mnist", *tiny, *folder, "--image-size", "16"], "empty"),
        "pack wide images": Scenario(["train", "vae-mnist", *tiny, *folder, *wide], "empty"),
        "data": Scenario(["data", images, *packing, "--out", str(out / "sheet.png")], "empty", prints=True),
        "train": Scenario(train, "packed"),
        "resume": Scenario(train, "half"),
        "finish": Scenario(train, "done"),
        "fresh": Scenario([*train, "--fresh"], "done"),
        "sample": Scenario(["sample", run, "--count", "8", "--out", sheet], "done"),
        "evaluate": Scenario(["evaluate", run, *quick], "done"),
        "evaluate more": Scenario(["evaluate", run, "--metrics", "diversity", "--samples", "100"], "evaluated"),
        "replay": Scenario(["replay", run, "--step", "5"], "done", prints=True),
        "report": Scenario(["report", run, *page], "evaluated"),
        "compare": Scenario(["compare", run, other, "--out", str(out)], "two"),
        "encode": Scenario(["encode", run, "--out", str(out / "latents"), "--shard-size", "900"], "done"),
        "export": Scenario(["export", run, "--format", "safetensors", "--out", str(out / "export")], "exported"),
        "train in shards": Scenario([*train, "--shards", "2"], "packed"),
        "resume in shards": Scenario([*train, "--shards", "2"], "half in shards"),
        "train from a run": Scenario([*train, "--from", other], "beside a run"),
        "resume from a run": Scenario([*train, "--from", other], "half from a run"),
        "train an autoencoder": Scenario(latent, "empty"),
        "encode to one file": Scenario(
            ["encode", run, "--out", str(out / "latents"), "--format", "npz"], "done with an autoencoder"
        ),
        "export for diffusers": Scenario(
            ["export", run, "--format", "diffusers", "--out", str(out / "vae")], "done with an autoencoder"
        ),
        "train from diffusers": Scenario([*latent, "--from", f"diffusers:{other}"], "beside a directory of diffusers"),
        "train a plug-in": Scenario(plugged, "with a plug-in"),
        "resume a plug-in": Scenario(plugged, "half of a plug-in"),
        "sample a plug-in": Scenario(["sample", run, "--count", "8", "--out", sheet], "plug-in alone"),
        "evaluate a plug-in": Scenario(["evaluate", run, *quick], "plug-in alone"),
        "report a plug-in": Scenario(["report", run, *page], "plug-in evaluated"),
        "fit a prior": Scenario(["fit-prior", run, "--components", "3"], "done"),
        "sample a fitted prior": Scenario(["sample", run, "--prior", "fitted", "--out", sheet], "done with a prior"),
        "walk": Scenario(["walk", run, *animation, "--out", str(out / "walk.webp")], "done"),
        "invert": Scenario(["invert", run, some_image, "--steps", "3", "--out", str(out / "found.npz")], "done"),
        "train on shards": Scenario(["train", "vae-mnist", *tiny, *shards], "with shards"),
        "resume on shards": Scenario(["train", "vae-mnist", *tiny, *shards], "half on shards"),
        "train and keep the best": Scenario([*train, *kept], "packed"),
        "check": Scenario(["check", str(root / "toy.py"), *toy], "with a source", prints=True),
    }


STATES = {
    "empty": State(None, change=lambda root: _write_images(root)),
    "packed": State("empty", "train", lambda root: _remove_run(root)),
    "done": State("packed", "train"),
    "half": State("done", change=lambda root: _lose_the_end(root)),
    "evaluated": State("done", "evaluate"),
    "encoded": State("done", "encode"),
    "exported": State("evaluated", "export"),
    "two": State("evaluated", change=lambda root: shutil.copytree(root / "run", root / "other", symlinks=True)),
    "half in shards": State("packed", "train in shards", lambda root: _lose_the_end(root)),
    "beside a run": State("done", change=lambda root: (root / "run").rename(root / "other")),
    "half from a run": State("beside a run", "train from a run", lambda root: _lose_the_end(root)),
    "done with an autoencoder": State("empty", "train an autoencoder"),
    "encoded to one file": State("done with an autoencoder", "encode to one file"),
    "exported for diffusers": State("done with an autoencoder", "export for diffusers"),
    "beside a directory of diffusers": State("exported for diffusers", change=lambda root: _keep_the_export(root)),
    "with a plug-in": State("packed", change=lambda root: (root / "mine.py").write_text(PLUGIN)),
    "done with a plug-in": State("with a plug-in", "train a plug-in"),
    "half of a plug-in": State("done with a plug-in", change=lambda root: _lose_the_end(root)),
    "plug-in alone": State("done with a plug-in", change=lambda root: (root / "mine.py").unlink()),
    "plug-in evaluated": State("plug-in alone", "evaluate a plug-in"),
    "done with a prior": State("done", "fit a prior"),
    "with shards": State("empty", change=lambda root: _write_shards(root)),
    "done on shards": State("with shards", "train on shards"),
    "half on shards": State("done on shards", change=lambda root: _lose_the_end(root)),
    "with a source": State("empty", change=lambda root: _write_source(root)),
}
"""States of the files by name."""


def _write_images(root: Path) -> None:
    (root / "out").mkdir(parents=True)
    (root / "tmp").mkdir()
    chance = np.random.default_rng(0)
    for place in range(12):
        path = root / "images" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (20, 20), dtype=np.uint8)).save(path)


def _write_source(root: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (24, 65), dtype=np.uint8)
    rows[:, 0] %= 3  # labels
    (root / "digits.toy").write_bytes(struct.pack("<4s4I", b"TOY1", 24, 8, 8, 3) + rows.tobytes())
    shutil.copy(Path(__file__).parents[1] / "plugins" / "toy_source.py", root / "toy.py")


def _write_shards(root: Path) -> None:
    (root / "shards").mkdir()
    images = sorted((root / "images").rglob("*.png"))
    for number in range(2):
        samples = [
            Sample(f"{place:03}", path.read_bytes(), "png", {"label": place % 2}, path.name)
            for place, path in enumerate(images[number::2])
        ]
        (root / "shards" / f"{number:03}.tar").write_bytes(tar_shard(samples))


def _remove_run(root: Path) -> None:
    shutil.rmtree(root / "run")


def _lose_the_end(root: Path) -> None:
    """Remove the newest checkpoint and what the end of a run writes, as if it had been killed before."""
    run = root / "run"
    shutil.rmtree(max((run / "checkpoints").glob("step_*")))
    (run / "summary.json").unlink()
    for picture in run.glob("*.png"):
        picture.unlink()


def _keep_the_export(root: Path) -> None:
    (root / "out" / "vae").rename(root / "other")
    _remove_run(root)
