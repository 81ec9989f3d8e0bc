"""DéjàVu: serve large language models over MPI ranks, with KV-cache streaming."""

__version__ = "0.1.0"
