"""The two Markov chains: forward noising in closed form, and the reverse kernels. No network is known here."""
