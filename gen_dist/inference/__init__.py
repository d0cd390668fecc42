"""A trained model in use: sampling, encoding, decoding, walks between latents, exports."""
