"""The streams of keyed randomness: every draw of a run is a function of (seed, stream, step, global row).

A stream is one use of randomness. Two uses never share a stream, so adding one changes no other. Numbers are part of
the definition of a run: never renumber them, only append.
"""

from enum import IntEnum


class Stream(IntEnum):
    """What a draw is for; the second word of its key."""

    ORDER = 0
    """Order of the training images; its step is the epoch."""
    HELD_OUT = 1
    """Which images of a source without a test split are held out."""
    LATENTS = 2
    """Noise that reparameterizes the posterior in training."""
    BINARIZATION = 3
    """Dynamic binarization of training images."""
    PRIOR = 4
    """Latents drawn from the prior."""
    TEST_LATENTS = 5
    """Noise that reparameterizes the posterior on the test split; its row is the image's position in the split."""
    TEST_BINARIZATION = 6
    """Binarization of test images."""
    SYNTHETIC = 7
    """Images of the `synthetic` source."""
    TEST_IMPORTANCE = 8
    """Noise of importance samples on the test split; as TEST_LATENTS."""
    REAL_AUGMENTATION = 9
    """Augmentation of training images in the discriminator's turn."""
    FAKE_AUGMENTATION = 10
    """Augmentation of generated images in the discriminator's turn."""
    GENERATOR_REAL_AUGMENTATION = 11
    """Augmentation of training images in the generator's turn, where its loss compares with them."""
    GENERATOR_FAKE_AUGMENTATION = 12
    """Augmentation of generated images in the generator's turn."""
    DISCRIMINATOR_LATENTS = 13
    """Latents of the generated images that a discriminator learns from at steps without a turn of the generator."""
    GENERATOR_LATENTS = 14
    """Latents of the images that a generator learns by."""
    PENALTY_MIX = 15
    """Where between a real and a generated image a gradient penalty is taken."""
    REAL_NOISE = 16
    """Noise on training images in the discriminator's turn; here and below, beside their augmentation."""
    FAKE_NOISE = 17
    """Noise on generated images in the discriminator's turn."""
    GENERATOR_REAL_NOISE = 18
    """Noise on training images in the generator's turn."""
    GENERATOR_FAKE_NOISE = 19
    """Noise on generated images in the generator's turn."""
    WALKS = 20
    """Ends of walks through the prior, and where on them the smoothness of the latent space is measured."""
