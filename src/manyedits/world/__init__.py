"""The embedded miniature: a world where every fact is known, and small language models that were trained in it.

A newcomer has no model of seven billion parameters, and nobody knows what a real one knows. Here every fact is known by
construction, abilities start near 100 %, and editing goes through exactly the code that a real model goes through.
"""
