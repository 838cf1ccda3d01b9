"""What a training step costs on machines that are not here: memory, time, collectives, price.

The real train step is compiled for a TPU topology on this machine; the answers are read out of the
compiled program. `olmax.planning.plan` does all of it, `chips` and `published` are the tables.
"""
