"""mlxd: the daemon that keeps local language models ready for every app of one user."""

__version__ = "0.1.0"
