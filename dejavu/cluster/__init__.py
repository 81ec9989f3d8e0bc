"""Starting ranks: the mpirun command line, profiles, per-rank start, communicators."""
