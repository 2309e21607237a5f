"""What tests of this package, and of packages that build on it, share: tiny models, a backend conformance suite."""
