"""Time, memory, launches and bandwidth of one pass."""
