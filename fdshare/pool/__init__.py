"""Process pools whose tasks take and return anything that a channel carries."""
