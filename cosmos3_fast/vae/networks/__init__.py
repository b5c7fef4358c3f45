"""The VAE's encoder and decoder as networks of 2-D convolutions."""
