ALQ=None
