"""Which tiles to label next."""
