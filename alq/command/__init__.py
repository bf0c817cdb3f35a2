"""The command line that the three scripts share."""
