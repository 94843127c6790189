"""The delta rule: a write replaces what the state holds at its key."""
