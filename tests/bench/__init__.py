"""Compares training scripts run by run: `python tests/bench run | show | speed` (see README.md)."""
