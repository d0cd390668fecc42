"""One VAE as other projects train it: compare.py measures them beside gen_dist, each in a process of its own.

The net is 784-400-20 with ReLU, the pixels are real-valued, the batch is 128, Adam's rate 1e-3, everything is float32.
"""

BATCH_SIZE = 128
LEARNING_RATE = 1e-3
HIDDEN, LATENT_DIM, PIXELS = 400, 20, 784
ENDLESS = 1_000_000
"""Epochs or steps of a training that goes on until its process is ended."""
