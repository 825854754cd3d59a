"""Small models trained on data that ships with Python packages, for the embedded demo."""
