"""The causal convolution before a recurrence, alone and with what follows it."""
