"""How time is taken: the protocol that interleaves engines, timers, and the clocks of the device.

Imports `compressor.values`.
"""
