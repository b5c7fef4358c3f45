"""Each engine's own latent preparation before and after: scripts for that engine's environment."""
