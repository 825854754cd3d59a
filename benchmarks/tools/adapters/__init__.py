"""Scripts that run inside the environments of other tools. They import nothing of Alphasmith; ``contract`` is what they share."""
