"""Factorized forms of a convolution: one per file, all in `FORMS`."""

from compressor.passes.layers.forms.base import Form, Sizes, Stage, StageSizes, compose
from compressor.passes.layers.forms.cp import CP
from compressor.passes.layers.forms.spatial_svd import SpatialSVD
from compressor.passes.layers.forms.svd import SVD
from compressor.passes.layers.forms.tensor_train import TensorTrain
from compressor.passes.layers.forms.tucker2 import Tucker2

__all__ = ["FORMS", "Form", "Sizes", "Stage", "StageSizes", "compose"]

_ALL: tuple[Form, ...] = (SVD(), SpatialSVD(), Tucker2(), CP(), TensorTrain())
FORMS: dict[str, Form] = {form.name: form for form in _ALL}
