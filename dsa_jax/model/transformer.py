"""The decoder-only transformer: embedding, scanned stacks of layers, head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsa_jax.model.attention import TOPK_NAME, check_request
from dsa_jax.model.block import Block
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, LayerStatistics, ModelOutput
from dsa_jax.model.selection import DENSE, SELECTORS
from dsa_jax.model.visibility import Visibility, causal_visibility, segment_positions


@dataclass(frozen=True)
class BlockStack:
    """`n_layers` consecutive layers of one kind; `shares_topk`: they reuse the selection of the layer before them.

    A plain dataclass on purpose: Flax leaves its unbound `block` alone, and the stack applies it once per layer.
    """

    name: str
    n_layers: int
    shares_topk: bool
    block: Block


class Transformer(nn.Module):
    """A language model whose attention layers can run dense or on a selection of keys. Made by `build_model`."""

    vocab_size: int
    hidden_dim: int
    stacks: tuple[BlockStack, ...]
    topk: int
    has_indexer: bool
    default_attention: str
    tie_embeddings: bool
    embedding_init_std: float
    init_std: float
    logits_scale: float
    norm_eps: float
    remat: str
    scan_layers: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Create the embedding, one parameter tree per stack, the final norm and the head."""
        self.embed = Embedding(self.vocab_size, self.hidden_dim, self.embedding_init_std, self.dtype, self.param_dtype)
        self.layer_params = [self._stack_params(stack) for stack in self.stacks]
        self.final_norm = RMSNorm(self.hidden_dim, self.norm_eps, self.dtype)
        if not self.tie_embeddings:
            self.lm_head = Head(self.hidden_dim, self.vocab_size, self.init_std, self.param_dtype)

    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        *,
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
        attention: str | None = None,
        indexer_loss: str | None = None,
        return_topk_indices: bool = False,
        return_coverage: bool = False,
        return_logits: bool = True,
        return_hidden: bool = False,
    ) -> ModelOutput:
        """One forward pass over whole rows.

        Args:
            input_ids: token ids; one outside the vocabulary gives NaN.
            positions: for the rotary embedding; None counts from the start of each segment.
            segment_ids: runs of equal non-zero ids attend within themselves, 0 is padding; None is one segment per row.
            attention: "dense", "sparse" (keys chosen by the indexer), "window" (the last topk keys) or "oracle" (keys chosen by
                true attention probability); None is as the checkpoint was trained.
            indexer_loss: "dense" for the KL over all visible keys, "sparse" for that over the attended ones; None for neither.
            return_topk_indices: whether to return what each layer selected.
            return_coverage: whether to measure the dense attention mass of the selection; costs a pass of dense attention.
            return_logits: False where the loss is computed chunk by chunk with `unembed`.
            return_hidden: whether to return the final hidden state.

        Raises:
            ValueError: for an unknown mode, or a combination that this model cannot compute.
        """
        request = AttentionRequest(attention or self.default_attention, indexer_loss, return_coverage)
        check_request(request, has_indexer=self.has_indexer, return_topk_indices=return_topk_indices)
        input_ids = jnp.asarray(input_ids)
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else jnp.asarray(segment_ids)
        visibility = causal_visibility(segment_ids)
        positions = segment_positions(segment_ids) if positions is None else jnp.asarray(positions)
        x = self.embed(input_ids)
        x, statistics = self._run_layers(x, positions, visibility, request, return_topk_indices)
        hidden = self.final_norm(x)
        return ModelOutput(
            logits=self.unembed(hidden) if return_logits else None,
            hidden=hidden if return_hidden else None,
            indexer_kl=statistics.indexer_kl,
            topk_indices=statistics.topk_indices,
            coverage=statistics.coverage,
            keys_per_query=statistics.keys_per_query,
            moe=statistics.moe,
        )

    def unembed(self, hidden: Float[Array, "*N E"]) -> Float[Array, "*N V"]:
        """Logits of final hidden states, float32."""
        kernel = self.embed.embedding.T if self.tie_embeddings else self.lm_head.kernel
        logits = jnp.matmul(hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits * self.logits_scale

    def _stack_params(self, stack: BlockStack) -> dict[str, Any]:
        # `self.param` would trace the initialiser on every call, only to compare shapes.
        if self.has_variable("params", stack.name):
            params: dict[str, Any] = self.get_variable("params", stack.name)
            for leaf in jax.tree.leaves(params):
                if leaf.shape[0] != stack.n_layers:
                    raise ValueError(
                        f"{stack.name} has {leaf.shape[0]} layers in the parameters; expected {stack.n_layers}. The checkpoint "
                        "does not fit the config."
                    )
            return params
        return self.param(stack.name, self._init_stack, stack)

    def _init_stack(self, key: PRNGKeyArray, stack: BlockStack) -> dict[str, Any]:
        ones = jnp.ones((1, 1), jnp.int32)
        # The dense loss makes every parameter of a layer take part, whatever mode the model will run in.
        request = AttentionRequest(DENSE, indexer_loss="dense" if self.has_indexer else None)

        def one(layer_key: PRNGKeyArray) -> dict[str, Any]:
            x = jnp.zeros((1, 1, self.hidden_dim), self.dtype)
            return stack.block.init(layer_key, x, ones - 1, causal_visibility(ones), None, request)["params"]

        return jax.vmap(one)(jax.random.split(key, stack.n_layers))

    def _run_layers(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        visibility: Visibility,
        request: AttentionRequest,
        return_topk_indices: bool,
    ) -> tuple[Float[Array, "B T E"], LayerStatistics]:
        """Run every stack; statistics are stacked over all layers."""
        by_indexer = request.attention != DENSE and SELECTORS[request.attention].uses_indexer
        carries_topk = by_indexer and any(stack.shares_topk for stack in self.stacks)
        carried = jnp.full((*x.shape[:2], self.topk), -1, jnp.int32) if carries_topk else None

        collected = []
        for stack, params in zip(self.stacks, self.layer_params, strict=True):

            def layer(state: Any, layer_params: Any, block: Any = stack.block) -> Any:
                hidden, previous_topk = state
                hidden, statistics = block.apply(
                    {"params": layer_params}, hidden, positions, visibility, previous_topk, request
                )
                following = statistics.topk_indices if carries_topk else None
                if not return_topk_indices:
                    statistics = statistics._replace(topk_indices=None)
                return (hidden, following), statistics

            layer = rematerialised(layer, self.remat, in_scan=self.scan_layers)
            (x, carried), statistics = run_stack(layer, (x, carried), params, stack.n_layers, scan=self.scan_layers)
            collected.append(statistics)
        moe = [s.moe for s in collected if s.moe is not None]
        plain = [s._replace(moe=None) for s in collected]
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *plain)
        return x, joined._replace(moe=jax.tree.map(lambda *parts: jnp.concatenate(parts), *moe) if moe else None)


def run_stack(layer: Callable, state: Any, params: Any, n_layers: int, *, scan: bool) -> tuple[Any, Any]:
    """Carry `state` through the layers; `scan` False unrolls them over the same stacked parameters."""
    if scan:
        return jax.lax.scan(layer, state, params)
    results = []
    for i in range(n_layers):
        state, statistics = layer(state, jax.tree.map(lambda leaf, i=i: leaf[i], params))
        results.append(statistics)
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def rematerialised(layer: Callable, policy: str, *, in_scan: bool) -> Callable:
    """`layer` with the backward pass recomputing by `policy`: "none", "full" (everything) or "dots" (all but matrix products).

    The selected indices are saved by name under every policy: selecting twice would cost more than it saves.
    """
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    keep = policies.save_only_these_names(TOPK_NAME)
    if policy == "dots":
        keep = policies.save_from_both_policies(keep, policies.dots_with_no_batch_dims_saveable)
    elif policy != "full":
        raise ValueError(f"remat is {policy!r}; expected none, full or dots.")
    return jax.checkpoint(layer, policy=keep, prevent_cse=not in_scan)


class Embedding(nn.Module):
    """A table of one vector per token."""

    vocab_size: int
    hidden_dim: int
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Create the table."""
        shape = (self.vocab_size, self.hidden_dim)
        self.embedding = self.param("embedding", nn.initializers.normal(self.init_std), shape, self.param_dtype)

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Look the tokens up; an id outside the table gives NaN instead of some other token."""
        rows = jnp.take(self.embedding, jnp.where(input_ids < 0, self.vocab_size, input_ids), axis=0, mode="fill")
        return rows.astype(self.dtype)


class Head(nn.Module):
    """The kernel of an untied output layer; `Transformer.unembed` applies it."""

    hidden_dim: int
    vocab_size: int
    init_std: float
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Create the kernel."""
        shape = (self.hidden_dim, self.vocab_size)
        self.kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype)
