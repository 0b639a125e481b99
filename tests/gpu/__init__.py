"""Tests that need a GPU; ``python -m tests.gpu`` runs them all and writes a report."""
