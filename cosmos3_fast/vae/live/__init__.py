"""A live VAE: its own results, and the seam by which its `encode` and `decode` take short cuts."""
