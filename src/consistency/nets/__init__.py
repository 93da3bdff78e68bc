"""Networks and the EDM-preconditioned denoiser around them."""
