"""`FoldBatchNorm`: batch norms in eval mode become part of the convolution or linear layer before them (`layers/norms.py`).

A norm stays where its layer's output is read by others as well, or the layer is used several times, or there is no layer before
it; the folded graph can no longer train as the original would.
"""

import logging
from typing import cast

from torch import Tensor, fx, nn

from compressor.passes.layers.norms import Norm, foldable, folded
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.base import PassResult

logger = logging.getLogger(__name__)


class FoldBatchNorm:
    """Fold every batch norm that can be; see the module."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return a copy with the norms folded, in eval mode."""
        if not any(True for _ in foldable(gm)):
            return PassResult(gm, False)
        result = quiet_deepcopy(gm).eval()
        count = 0
        for layer, norm in list(foldable(result)):
            module = result.get_submodule(str(layer.target))
            weight, bias = folded(module, cast(Norm, result.get_submodule(str(norm.target))))
            module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
            norm.replace_all_uses_with(layer)
            result.graph.erase_node(norm)
            count += 1
        result.delete_all_unused_submodules()
        result.graph.lint()
        result.recompile()
        logger.info("FoldBatchNorm: %d norms folded", count)
        return PassResult(result, True)


def folded_state(gm: fx.GraphModule) -> dict[str, Tensor]:
    """What `FoldBatchNorm` would leave in the `state_dict`, without copying the graph."""
    state = {name: value.detach() for name, value in gm.state_dict().items()}
    for layer, norm in foldable(gm):
        weight, bias = folded(gm.get_submodule(str(layer.target)), cast(Norm, gm.get_submodule(str(norm.target))))
        state[f"{layer.target}.weight"], state[f"{layer.target}.bias"] = weight, bias
        for name in [name for name in state if name.startswith(f"{norm.target}.")]:
            del state[name]
    return state
