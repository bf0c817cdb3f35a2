"""The method, in the order of the paper."""
