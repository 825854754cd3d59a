"""The compressed model at work: media in, classes or text out, through the integer model. Source: claims A-14 and A-27.

- ``_answers``: what a model answers with, as probabilities of classes that have names
- ``_description``: what the integer model of a run is, for people and for clients of a service
- ``_opening``: the integer model of a run or an output folder, with what its inputs are read with
- ``classifier``: media to probabilities and classes, one item or many
"""

__all__ = ["classifier"]
