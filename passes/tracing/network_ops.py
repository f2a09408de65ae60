"""Which functions a network file may name: a list, since what is on none cannot be known to be harmless.

Of PyTorch's thousands of ops some write files, change global settings, or read beyond a tensor's memory.
"""

import math
import operator
import re
from typing import Any

import torch

from compressor.errors import DataError, PassError

_ON_SIZES = {
    f"{module.__name__.strip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, ["add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge"]),
        (math, ["ceil", "floor", "trunc"]),
        (torch, ["sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite"]),
    )
    for name in names
}
_LISTED = """
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _weight_norm _weight_norm_interface abs_ absolute adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d all alpha_dropout alpha_dropout_ avg_pool1d baddbmm
    batch_norm broadcast_to channel_shuffle chunk concat concatenate contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d copy_ detach detach_ divide dropout dropout_ einsum expand_as feature_dropout
    feature_dropout_ fill_ flatten floor_divide gelu_ glu grid_sampler group_norm hardswish hardswish_ im2col
    instance_norm layer_norm lift_fresh_copy linalg_vector_norm linear linspace log_sigmoid log_softmax logsumexp
    masked_fill_ matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool3d meshgrid mish_ moveaxis movedim multiply
    narrow native_channel_shuffle new_full new_ones new_zeros norm one_hot ones ones_like pad pixel_shuffle
    pixel_unshuffle prelu relu6_ repeat_interleave reshape reshape_as rms_norm roll scaled_dot_product_attention softmax
    split stack std std_mean subtract swapaxes swapdims t take_along_dim tensor_split threshold_ tile to transpose tril
    triu type_as unbind unflatten unfold unsafe_chunk unsafe_split upsample_bicubic2d upsample_linear1d upsample_nearest1d
    upsample_nearest3d upsample_trilinear3d var_mean view_as zero_ zeros zeros_like
"""
_OPS = set(_LISTED.split())
"""Besides those that PyTorch tags as core or pointwise: what tracing, the op rules and the passes leave in a graph."""
_UNSAFE = {"as_strided", "resize_", "empty", "empty_strided", "_local_scalar_dense", "_embedding_bag", "col2im"}
"""Tagged as core, and still: they read memory that is not the tensor's, or hand out what was never written."""


def name_of(target: Any) -> str:
    """What a file calls a function; raises `PassError` for one that none may name."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}::{target._opname}.{target._overloadname}"
        try:
            function_of(name)
        except DataError as error:
            raise PassError(f"a network file may not hold the op {name}") from error
        return name
    for name, known in _ON_SIZES.items():
        if target is known:
            return name
    raise PassError(f"a network file has no word for {target}")


def function_of(name: object) -> Any:
    """The function that a file names; raises `DataError` for one that none may name."""
    if not isinstance(name, str):
        raise DataError(f"{name!r} is no op")
    if name in _ON_SIZES:
        return _ON_SIZES[name]
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    refused = DataError(f"{name!r} is no op that a network file may hold; load it with the model: compressor.load(run, model)")
    if namespace != "aten" or not re.fullmatch(r"\w+\.\w+", rest) or packet.startswith("__") or packet in _UNSAFE:
        raise refused
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise refused
    if packet not in _OPS and not {torch.Tag.core, torch.Tag.pointwise} & set(found.tags):
        raise refused
    return found
