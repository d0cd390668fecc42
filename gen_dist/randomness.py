"""Streams of keyed randomness: every draw of a run is a function of (seed, stream, step, global row).

A stream is one use of randomness. Two uses never share a stream, so adding one changes no other. The numbers are part
of the definition of a run: only append, never renumber.
"""

from enum import IntEnum, unique


@unique
class Stream(IntEnum):
    """Purpose of a draw; the second word of its key."""

    ORDER = 0
    """Order of the training images; its step is the epoch."""
    HELD_OUT = 1
    """Choice of the held-out images of a source without a test split."""
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
    """Augmentation of training images in the generator's turn, for losses that compare with them."""
    GENERATOR_FAKE_AUGMENTATION = 12
    """Augmentation of generated images in the generator's turn."""
    DISCRIMINATOR_LATENTS = 13
    """Latents of generated images in the discriminator's turn, at steps without a turn of the generator."""
    GENERATOR_LATENTS = 14
    """Latents of generated images in the generator's turn."""
    PENALTY_MIX = 15
    """Position between a real and a generated image at which a gradient penalty is computed."""
    REAL_NOISE = 16
    """Noise on training images in the discriminator's turn; like the three below, separate from augmentation."""
    FAKE_NOISE = 17
    """Noise on generated images in the discriminator's turn."""
    GENERATOR_REAL_NOISE = 18
    """Noise on training images in the generator's turn."""
    GENERATOR_FAKE_NOISE = 19
    """Noise on generated images in the generator's turn."""
    WALKS = 20
    """Ends of walks through the prior, and positions on them at which smoothness is measured."""
    CODES = 21
    """Vectors of a batch that take the place of dead codes; its row is the code."""
    SHARDS = 22
    """Order of shards; its step is the epoch."""
    SHARD_WINDOWS = 23
    """Order of images within a group of shards; see `gen_dist.data.shard_order`."""
    IMAGE_CHANGES = 24
    """Random changes of training images (`augment`)."""
    DISCRIMINATOR_LAYER_NOISE = 25
    """Noise inputs of the generator's layers, for DISCRIMINATOR_LATENTS."""
    GENERATOR_LAYER_NOISE = 26
    """Noise inputs of the generator's layers, for GENERATOR_LATENTS."""
    MEAN_STYLE = 27
    """Latents of the mean style, towards which samples are truncated."""
    BOOTSTRAP = 28
    """Images of the sets that are drawn for confidence intervals; its step is the set."""
    FITTED_PRIOR = 29
    """Latents drawn from a fitted prior."""
    FITTED_LATENTS = 30
    """Noise that reparameterizes posteriors of training images, to which a prior is fitted."""
    REAL_RANDOM_AUGMENTATION = 31
    """Augmentation with a probability of training images in the discriminator's turn; the four as REAL_AUGMENTATION."""
    FAKE_RANDOM_AUGMENTATION = 32
    """The same of generated images."""
    GENERATOR_REAL_RANDOM_AUGMENTATION = 33
    """The same of training images in the generator's turn."""
    GENERATOR_FAKE_RANDOM_AUGMENTATION = 34
    """The same of generated images in the generator's turn."""
    MIXED_LATENTS = 35
    """Latents of the second style of images that mix two, for GENERATOR_LATENTS and DISCRIMINATOR_LATENTS."""
    MIXED_PLACES = 36
    """Places of the synthesis at which the second style begins."""
    PATH_DIRECTIONS = 37
    """Directions in images along which path lengths are measured."""
