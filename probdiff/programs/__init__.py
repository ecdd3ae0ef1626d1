"""The NumPyro programs."""
