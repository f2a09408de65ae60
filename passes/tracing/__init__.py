"""Any model in, one graph language out: trace, shapes, constants, modes, and graphs that travel to other processes.

Imports nothing of the other rooms.
"""
