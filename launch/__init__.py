"""What runs on one node of a run: find the other nodes, set the environment, check the machine, start the ranks.

Run from a checkout (``launch/torchrun.sh``, ``slurm/*.sh``); not part of the installed package.
"""
