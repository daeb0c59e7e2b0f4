"""Reward functions and their weighting. `megalong plan` reads the functions' names: this and them import no torch."""
