"""Holds `sitecustomize`, which `trimtab dump` puts on the path of the program that it runs."""
