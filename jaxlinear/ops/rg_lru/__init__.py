"""The RG-LRU: its gates, and the recurrence that they drive."""
