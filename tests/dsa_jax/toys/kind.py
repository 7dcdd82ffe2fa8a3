"""An attention kind from outside the package: grouped-query attention with a learned factor on each head's output."""

import jax.numpy as jnp
from flax import linen as nn

from dsa_jax.config.attention import kind_fields
from dsa_jax.model.attention import gqa
from dsa_jax.model.attention.base import Parameter

FIELDS = kind_fields("gqa")._replace(name="gated")


class Gated(gqa.GQA):
    def setup(self):
        super().setup()
        shape, dtype = (self.config.attention.n_heads,), jnp.dtype(self.config.param_dtype)
        self.head_gate = self.param("head_gate", nn.initializers.zeros, shape, dtype)

    def project_out(self, out):
        return super().project_out(out * (1 + self.head_gate[:, None]).astype(out.dtype))


KIND = gqa.GQA_KIND._replace(
    fields=FIELDS,
    build=Gated,
    parameters=(*gqa.PARAMETERS, Parameter("head_gate", ("tensor",), "self_attn.head_gate")),
)
