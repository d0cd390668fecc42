"""Train the digit network that judges samples, on full MNIST.

Minutes on two cores; the same weights each time on one machine and number of threads. It writes the weights and their
card, digits.json, to gen_dist/features, where the package takes them from.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from gen_dist.config import DataConfig
from gen_dist.data import Split, image_indices, open_dataset
from gen_dist.evaluation.features.digits import CARD_FILE, WEIGHTS_FILE, DigitNetwork, load_digit_network
from gen_dist.files import write_atomically

BATCH_SIZE = 128
LEARNING_RATE = 3e-3
LARGEST_SHIFT = 2
LARGEST_TURN = 0.2
LARGEST_SCALE = 0.1
LEAST_ACCURACY = 0.993


def main(data_root: Path, epochs: int = 8, seed: int = 0, threads: int = 2) -> None:
    """Train, test as it is stored, and write; refuse to write a network that is not good enough.

    Args:
        data_root: directory with torchvision's MNIST; a missing one is downloaded to there.
        epochs: passes over the 60,000 training images.
        seed: of the initial weights, the order and the distortions.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    dataset = open_dataset("mnist", str(data_root), DataConfig())
    started = time.perf_counter()
    network = _trained(dataset.train, epochs, seed)
    _normalize_features(network, dataset.train)
    seconds = time.perf_counter() - started
    halves = {
        name: value.half() for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    content = save(halves)
    file = WEIGHTS_FILE.with_name("digits-candidate.safetensors")
    write_atomically(file, content)
    try:
        accuracy = _accuracy(load_digit_network(file), dataset.test)
    finally:
        file.unlink()
    if accuracy < LEAST_ACCURACY:
        sys.exit(f"it is right for {accuracy:.2%} of the test images; nothing is written below {LEAST_ACCURACY:.2%}")
    card = {
        "what": "digit classifier; its features are the 64 units before the last layer, after ReLU, of mean square 1",
        "input": "float32 [B, 1, 28, 28], intensities in 0..1",
        "sha256": hashlib.sha256(content).hexdigest(),
        "stored_as": "float16",
        "parameters": sum(p.numel() for p in network.parameters()),
        "test_accuracy": accuracy,
        "test_images": len(dataset.test.images),
        "trained_on": {"data": "mnist, train split", "images": len(dataset.train.images), "digest": dataset.digest},
        "recipe": {
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            "optimizer": "AdamW, weight decay 0.01, one cycle",
            "highest_learning_rate": LEARNING_RATE,
            "distortions": f"shifts to {LARGEST_SHIFT} pixels, turns to {LARGEST_TURN} rad, scales to {LARGEST_SCALE}",
            "seed": seed,
            "seconds": round(seconds),
        },
        "conditions": conditions(),
    }
    write_atomically(WEIGHTS_FILE, content)
    write_atomically(CARD_FILE, json.dumps(card, indent=2) + "\n")
    print(f"{accuracy:.2%} of {len(dataset.test.images):,} test images; {len(content):,} bytes in {WEIGHTS_FILE}")


def _trained(split: Split, epochs: int, seed: int) -> DigitNetwork:
    torch.manual_seed(seed)
    network = DigitNetwork()
    steps = epochs * (len(split.images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    for step in tqdm(range(steps), desc="digit network", unit="step", mininterval=2.0):
        chosen = image_indices(len(split.images), seed, step, BATCH_SIZE, 0, BATCH_SIZE)
        images, labels = torch.from_numpy(split.images[chosen]), torch.from_numpy(split.labels[chosen])
        optimizer.zero_grad()
        F.cross_entropy(network(_distorted(images * (1.0 / 255.0))).logits, labels).backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def _normalize_features(network: DigitNetwork, split: Split) -> None:
    """Have features of training images a mean square of 1, which a kernel of (x . y / F + 1)^3 takes for granted.

    The last layer makes up for it: logits stay what they are.
    """
    network.eval()
    chunks = torch.from_numpy(split.images).split(500)
    mean_square = torch.stack([network(chunk * (1.0 / 255.0)).features.square().mean() for chunk in chunks]).mean()
    hidden = network.trunk[-2]
    assert isinstance(hidden, torch.nn.Linear)
    for parameter in hidden.parameters():
        parameter.div_(mean_square.sqrt())
    network.head.weight.mul_(mean_square.sqrt())


def _distorted(intensities: Tensor) -> Tensor:
    """Each image [B, 1, 28, 28] turned, scaled and shifted a little."""
    count, side = len(intensities), intensities.shape[-1]
    turn = (torch.rand(count) * 2.0 - 1.0) * LARGEST_TURN
    scale = 1.0 + (torch.rand(count) * 2.0 - 1.0) * LARGEST_SCALE
    shift = (torch.rand(count, 2) * 2.0 - 1.0) * (2.0 * LARGEST_SHIFT / side)
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    affine = torch.stack((cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]), dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, list(intensities.shape), align_corners=False)
    return F.grid_sample(intensities, grid, align_corners=False)


def _accuracy(network: DigitNetwork, split: Split) -> float:
    with torch.no_grad():
        chunks = torch.from_numpy(split.images).split(500)
        found = torch.cat([network(chunk * (1.0 / 255.0)).logits.argmax(dim=1) for chunk in chunks])
    return float((found == torch.from_numpy(split.labels)).double().mean())


if __name__ == "__main__":
    tyro.cli(main)
