"""`Product`: patches times matrix = the layer itself, for every kind of layer."""

import pytest
import torch
from torch import nn

from compressor.passes.layers.product import Product, sample

CASES = {
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "strided and padded": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 8)),
    "dilated": (nn.Conv2d(4, 6, (3, 2), dilation=(2, 3), padding=(2, 1)), (2, 4, 9, 9)),
    "padding same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 6, 6)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "1x1": (nn.Conv2d(6, 5, 1), (2, 6, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 5, stride=2, padding=3), (2, 4, 11)),
    "conv3d": (nn.Conv3d(3, 4, (1, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), (2, 3, 4, 6, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 6)),
    "transposed, dilated": (nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=3), (2, 4, 7, 7)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 4, stride=3), (2, 4, 5)),
    "linear": (nn.Linear(5, 7), (4, 5)),
    "linear over tokens": (nn.Linear(5, 7, bias=False), (2, 6, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_patches_times_the_matrix_are_the_layers_outputs(name):
    module, shape = CASES[name]
    module, x = module.double(), torch.randn(*shape, dtype=torch.float64)
    product = Product(module)
    y = module(x)
    at = sample(product.grid(y.shape), 11, torch.Generator().manual_seed(0))
    found = torch.einsum("ngd,god->ngo", product.patches(x, at), product.matrix()).flatten(1) + product.bias
    assert torch.allclose(found, product.values(y, at), atol=1e-12)
    assert product.columns == product.patches(x, at).shape[2]
    assert (product.inputs, product.outputs) == (shape[product.channel_axis], y.shape[product.channel_axis])


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_is_read(name):
    module, shape = CASES[name]
    product = Product(module.double())
    x = torch.randn(*shape, dtype=torch.float64)
    before = module(x)
    matrix = product.matrix()
    product.write(2 * matrix, product.bias)
    shape_of_bias = [-1 if axis == product.channel_axis % before.dim() else 1 for axis in range(before.dim())]
    bias = product.bias.view(shape_of_bias)
    assert torch.allclose(module(x) - bias, 2 * (before - bias), atol=1e-9)
    product.write(matrix, product.bias)
    assert torch.equal(product.matrix(), matrix)


def test_positions_are_drawn_without_replacement_and_all_of_them_where_few():
    generator = torch.Generator().manual_seed(0)
    few = sample((3, 2), 100, generator)
    assert few.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    some = sample((8, 8), 20, generator)
    assert len({tuple(position) for position in some.tolist()}) == 20
    assert sample((), 5, generator).shape == (1, 0)
