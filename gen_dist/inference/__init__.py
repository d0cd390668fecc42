"""Use of a trained model: sampling, encoding, decoding, walks between latents, exports."""
