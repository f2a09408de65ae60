"""What real networks are built of: small networks, one per construct, by name."""

from tests.constructs import attention, blocks, ops, parameters

NETS = {**blocks.NETS, **attention.NETS, **ops.NETS, **parameters.NETS}
