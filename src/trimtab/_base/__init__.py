"""Machinery that every floor may use: optional imports, provenance, files, progress, logging, JSON."""
