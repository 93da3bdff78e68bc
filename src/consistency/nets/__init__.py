"""Networks, the EDM denoiser around them, and their files. How they are trained belongs to training."""
