"""The ladder of losses of any model file, ours or not: climb.py makes it, found.py says what it is."""
