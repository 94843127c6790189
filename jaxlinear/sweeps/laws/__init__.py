"""Scaling laws, which predict the loss from parameters and tokens, fitted to finished runs."""
