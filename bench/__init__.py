"""Measurement. Nothing imports it but its own tests."""
