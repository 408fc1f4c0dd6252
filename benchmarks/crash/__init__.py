"""Stops real commands at random moments, resumes them, and compares every byte with an undisturbed run; see `__main__`."""
