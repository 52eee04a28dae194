"""The decoder's parts as the kernels read them: `Layer` and `Model` of `kernels.cpp`."""

import ctypes

from torch import Tensor

from layerskip.model.decoder import Layer
from layerskip.model.mlp import MLP
from layerskip.model.native.panels import MatrixStruct, PanelMatrix
from layerskip.model.norm import HeadNorm, RMSNorm


class LayerStruct(ctypes.Structure):
    """`Layer` of `kernels.cpp`."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("attention_post_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp_post_norm", ctypes.c_void_p),
        ("qk_norm", ctypes.c_void_p),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
        ("qkv", MatrixStruct),
        ("attention_out", MatrixStruct),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
    )


class ModelStruct(ctypes.Structure):
    """`Model` of `kernels.cpp`."""

    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("ffn", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("cache_kind", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("layers", ctypes.c_void_p),
    )


class HeldLayer:
    """One layer's vectors in float32, kept for the kernels."""

    def __init__(self, layer: Layer) -> None:
        norms = (
            layer.attention_norm,
            layer.attention_post_norm,
            layer.mlp_norm,
            layer.mlp_post_norm,
            layer.qk_norm,
        )
        self._weights = [None if norm is None else weight_of(norm) for norm in norms]
        assert isinstance(layer.mlp, MLP)
        assert layer.mlp.is_gated
        products = (layer.qkv, layer.attention_out, layer.mlp.gate_up, layer.mlp.down)
        self._matrices = [product for product in products if isinstance(product, PanelMatrix)]

    def struct(self, window: int, rope: int) -> LayerStruct:
        """Where the layer's parts are; valid as long as it lives."""
        pointers = [None if w is None else w.data_ptr() for w in self._weights]
        return LayerStruct(*pointers, window, rope, *(m.struct for m in self._matrices))


def weight_of(norm: object) -> Tensor:
    """A norm's weights as the kernels read them."""
    assert isinstance(norm, RMSNorm | HeadNorm)
    return norm.weight.float().contiguous()
