"""Scaling laws: how the loss follows from parameters and tokens, fitted to finished runs."""
