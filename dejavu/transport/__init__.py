"""The carriers: how bytes move between ranks, one carrier per file."""
