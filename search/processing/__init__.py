"""The compressed model at work: media in, classes or text out, through the integer model. Source: claims A-14 and A-27.

- ``answers``: what a model answers with, as probabilities of classes that have names
- ``opening``: the integer model of a run or an output folder, with what its inputs are read with
- ``classifier``: media to probabilities and classes, one item or many
- ``description``: what the integer model of a run is, for people and for clients of a service
- ``generator``: texts that follow prompts, written by the integer model of a language model
- ``service``: a model behind HTTP, with bounded requests, dynamic batching and a stop in good order
- ``sources``: items out of what a command line names: files, folders, patterns, lists, tables, texts, standard input
"""

__all__ = ["answers", "classifier", "description", "generator", "opening", "service", "sources"]
