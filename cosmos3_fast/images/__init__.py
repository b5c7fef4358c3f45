"""Pictures and clips in any form to pixels, and latents drawn as pictures."""
