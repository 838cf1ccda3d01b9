"""From a command to commands and manifests that run it on every host of a TPU slice or a cluster.

Each runner renders text; nothing is run, and nothing leaves this machine, unless that is asked for.
"""
