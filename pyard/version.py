"""The version, apart from everything that would have to be imported with it."""

# What is said of all that pyard-runtime leaves out.
MISSING = "only pyard-runtime is installed, which draws with exported students; for everything else: pip install pyard-distill"

__version__ = "0.2.0"
