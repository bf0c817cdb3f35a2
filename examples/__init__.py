"""Networks and data for the documents' examples; run from the project's folder."""
