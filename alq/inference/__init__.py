"""Networks that compute from the bits of their weights: docs/inference.md."""
