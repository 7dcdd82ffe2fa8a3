"""The decoder-only transformer: embedding, scanned stacks of layers, head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsa_jax.config import LayerSpec, ModelConfig
from dsa_jax.config.attention import FULL, SHARED
from dsa_jax.model.attention.attend import TOPK_NAME
from dsa_jax.model.attention.cache import INDEX_KEYS, Cache, CacheEntry, LayerCache, allocate_cache, token_slots
from dsa_jax.model.attention.check import check_request
from dsa_jax.model.attention.health import selection_health
from dsa_jax.model.attention.indexer import zero_index_heads
from dsa_jax.model.attention.kinds import attention_kind
from dsa_jax.model.attention.selection import all_slots
from dsa_jax.model.attention.visibility import causal_visibility, segment_positions
from dsa_jax.model.block import Block
from dsa_jax.model.inputs import at_least_32_bits, check_inputs, check_new_tokens
from dsa_jax.model.kernels import pick, widens_slices
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, ExtendOutput, LayerContext, LayerStatistics, ModelOutput
from dsa_jax.model.precision import precision_of
from dsa_jax.parallel.ambient import check_auto_axes
from dsa_jax.parallel.sequence import check_rows, constrain, from_balanced, to_balanced
from pallas_kernels import Visible, checked


@dataclass(frozen=True)
class BlockStack:
    """`n_layers` consecutive equal layers.

    A plain dataclass on purpose: Flax leaves its unbound `block` alone, and the stack applies it once per layer.
    """

    name: str
    n_layers: int
    block: Block

    @property
    def layer(self) -> LayerSpec:
        """Each of them."""
        return self.block.layer


class Transformer(nn.Module):
    """A language model whose attention layers can run dense or on a selection of keys. Made by `build_model`."""

    config: ModelConfig
    stacks: tuple[BlockStack, ...]

    def setup(self) -> None:
        """Create the embedding, one parameter tree per stack, the final norm and the head."""
        config = self.config
        self.embed = Embedding(config)
        self.layer_params = [self._stack_params(stack) for stack in self.stacks]
        self.final_norm = RMSNorm(config.hidden_dim, config.norm_eps, jnp.dtype(config.dtype))
        if not config.tie_embeddings:
            self.lm_head = Head(config)

    @checked(check_inputs)
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
            input_ids: token ids; one outside the vocabulary gives NaN. Padding may hold anything.
            positions: for the rotary embedding; None counts from the start of each segment.
            segment_ids: runs of equal non-zero ids attend within themselves, 0 is padding; None is one segment per row.
            attention: "dense", "sparse" (keys chosen by the indexer), "window" (the last topk keys), "oracle" (keys chosen by
                true attention probability) or another of `dsa_jax.config.selections`; None is as the checkpoint was trained.
            indexer_loss: "dense" for the KL over all visible keys, "sparse" for that over the attended ones; None for neither.
            return_topk_indices: whether to return what each layer selected.
            return_coverage: whether to measure the dense attention mass of the selection, and where blocks are chosen how much
                of the indexer's top-k it holds; costs a pass of dense attention and that top-k.
            return_logits: False where the loss is computed chunk by chunk with `unembed`.
            return_hidden: whether to return the final hidden state.

        Raises:
            ValueError: for an unknown mode, or a combination that this model cannot compute; for input_ids, positions or
                segment_ids that are not whole numbers of one shape [B, T]; for arrays split over Explicit axes of a mesh.
            NotImplementedError: for the selection of native sparse attention.
        """
        request = AttentionRequest(self._mode(attention), indexer_loss, return_coverage)
        check_request(self.config, request, return_topk_indices=return_topk_indices)
        input_ids = at_least_32_bits(input_ids)
        check_auto_axes(input_ids, self.layer_params)
        check_rows(input_ids.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids)
        else:
            segment_ids = at_least_32_bits(segment_ids)
            # The NaN of an id outside the vocabulary would reach gradients and the balance loss, with a weight of 0.
            input_ids = jnp.where(segment_ids == 0, 0, input_ids)
        visible = jax.tree.map(to_balanced, causal_visibility(segment_ids))
        positions = segment_positions(segment_ids) if positions is None else at_least_32_bits(positions)
        first = self._first_topk(input_ids.shape, request, n_keys=input_ids.shape[1])
        context = LayerContext(to_balanced(positions), visible, first)
        x, statistics = self._run_layers(self.embed(to_balanced(input_ids)), context, request, return_topk_indices)
        hidden, indices = from_balanced(self.final_norm(x)), statistics.topk_indices
        if indices is not None:
            indices = all_slots(from_balanced(indices, axis=2), self.config.attention.indexer.topk)
        return ModelOutput(
            logits=self.unembed(hidden) if return_logits else None,
            hidden=hidden if return_hidden else None,
            indexer_kl=statistics.indexer_kl,
            topk_indices=indices,
            coverage=statistics.coverage,
            keys_per_query=statistics.keys_per_query,
            moe=statistics.moe,
            indexer_recall=statistics.indexer_recall,
            health=statistics.health,
        )

    @nn.nowrap
    def init_cache(
        self,
        n_rows: int,
        capacity: int,
        *,
        dtype: str | None = None,
        page_size: int | None = None,
        n_pages: int | None = None,
        block_table: Int[Array | np.ndarray, "B P"] | None = None,
        with_index_keys: bool = True,
    ) -> Cache:
        """An empty cache for `extend`; needs no parameters.

        Args:
            n_rows: sequences.
            capacity: longest sequence in tokens.
            dtype: "float32", "bfloat16" or "fp8"; None is the dtype of the activations.
            page_size: tokens per page; None keeps each row in one piece of `capacity` tokens.
            n_pages: pages in all; None is as many as all rows need at `capacity`.
            block_table: int32 [n_rows, ceil(capacity / page_size)], the pages of each row in order, -1 where it owns none.
                No page may have two owners. None gives every row its full number of consecutive pages.
            with_index_keys: whether to keep the indexer's keys; False saves them where attention is always dense.

        Raises:
            ValueError: for an unknown dtype, or sizes that do not fit together.
        """
        stacks = {}
        for stack in self.stacks:
            entries = attention_kind(stack.layer.kind).cache_entries(self.config.attention)
            if with_index_keys and stack.layer.has_indexer:
                entries = entries | {INDEX_KEYS: CacheEntry((self.config.attention.indexer.head_dim,))}
            stacks[stack.name] = stack.n_layers, entries
        return allocate_cache(
            stacks,
            n_rows=n_rows,
            capacity=capacity,
            dtype=dtype or self.config.dtype,
            page_size=page_size,
            n_pages=n_pages,
            block_table=None if block_table is None else jnp.asarray(block_table, jnp.int32),
        )

    def extend(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        n_new: Int[Array | np.ndarray, " B"],
        cache: Cache,
        *,
        attention: str | None = None,
        return_all_logits: bool = False,
        return_topk_indices: bool = False,
    ) -> ExtendOutput:
        """Append tokens to the cache: a chunk of a prompt, or one token while decoding; rows may get different numbers.

        Computes what `__call__` does for the same tokens after all those before them, up to rounding.

        Args:
            input_ids: the first `n_new[b]` of row b are appended, the rest is padding.
            n_new: 0 to T per row. Tokens beyond the capacity of their row, or in a page that it does not own, are lost.
            cache: of `init_cache`; donate it, so that it is updated in place.
            attention: as in `__call__`.
            return_all_logits: whether to return the logits of every position.
            return_topk_indices: whether to return what each layer selected.

        Raises:
            ValueError: for an unknown mode, or one that needs an indexer or index keys that are not there, token ids that are
                no whole numbers [B, T] of the cache's rows, known numbers of new tokens outside 0 to T, or arrays split over
                Explicit axes of a mesh.
            NotImplementedError: for native sparse attention.
        """
        request = AttentionRequest(self._mode(attention))
        check_request(self.config, request, return_topk_indices=return_topk_indices, cached=True)
        if request.by_indexer and not any(INDEX_KEYS in pools for pools in cache.pools.values()):
            raise ValueError(
                f"attention is {request.attention!r}, but the cache holds no index keys. Make it with with_index_keys=True."
            )
        check_new_tokens(input_ids, n_new, n_rows=cache.lengths.shape[0])
        input_ids, n_new = at_least_32_bits(input_ids), jnp.asarray(n_new, jnp.int32)
        check_auto_axes(input_ids, cache.pools, self.layer_params)
        steps = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        positions = cache.lengths[:, None] + steps
        valid = steps < n_new[:, None]
        visible = Visible(jnp.zeros_like(positions), jnp.where(valid, positions + 1, 0))
        context = LayerContext(positions, visible, self._first_topk(input_ids.shape, request, n_keys=cache.capacity))
        x, pools, indices = self._extend_layers(self.embed(input_ids), context, cache, request)
        if indices is not None:
            indices = all_slots(indices, self.config.attention.indexer.topk)
        last = jnp.take_along_axis(x, jnp.maximum(n_new - 1, 0)[:, None, None], axis=1)
        return ExtendOutput(
            logits=self.unembed(self.final_norm(last))[:, 0],
            all_logits=self.unembed(self.final_norm(x)) if return_all_logits else None,
            topk_indices=indices if return_topk_indices else None,
            cache=cache._replace(pools=pools, lengths=cache.lengths + n_new),
        )

    def touch(self, input_ids: Int[Array, "B T"]) -> None:
        """Use every parameter, for `init`: far less to trace than a forward pass."""
        self.unembed(self.final_norm(self.embed(input_ids)))

    def unembed(self, hidden: Float[Array, "*N E"]) -> Float[Array, "*N V"]:
        """Logits of final hidden states, float32."""
        kernel = self.embed.embedding.T if self.config.tie_embeddings else self.lm_head.kernel
        return head_logits(hidden, kernel, dtype=jnp.dtype(self.config.dtype), scale=self.config.logits_scale)

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
        def one(layer_key: PRNGKeyArray) -> dict[str, Any]:
            x = jnp.zeros((1, 1, self.config.hidden_dim), jnp.dtype(self.config.dtype))
            return stack.block.init(layer_key, x, jnp.zeros((1, 1), jnp.int32), method="touch")["params"]

        return jax.vmap(one)(jax.random.split(key, stack.n_layers))

    def _run_layers(
        self, x: Float[Array, "B T E"], context: LayerContext, request: AttentionRequest, return_topk_indices: bool
    ) -> tuple[Float[Array, "B T E"], LayerStatistics]:
        """Run every stack; statistics are stacked over all layers."""
        config = self.config
        distils = config.attention.indexer.distill_shared and request.indexer_loss is not None
        last_heads: Any = None  # of the last layer with an indexer, where layers after it have a loss against them
        carried, collected, topk = context.previous_topk, [], config.attention.indexer.topk
        neighbour = self._no_topk(x.shape[:2], n_keys=x.shape[1]) if request.measures_health else None
        for number, (stack, params) in enumerate(zip(self.stacks, self.layer_params, strict=True)):
            role, serves = stack.layer.role, distils and self._is_shared(number)
            # All layers of a stack that shares are served by the same one: a constant of the loop, where a carry would be
            # kept once per layer for the backward pass.
            shared = context._replace(served_by=last_heads if role == SHARED else None)

            def layer(
                state: Any, layer_params: Any, block: Any = stack.block, serves: bool = serves, shared: Any = shared
            ) -> Any:
                hidden, previous_topk, neighbour, _ = state
                own = shared._replace(previous_topk=previous_topk)
                hidden, statistics = block.apply({"params": layer_params}, constrain(hidden), own, request)
                selected = statistics.topk_indices
                following = next_topk(block.layer, previous_topk, selected)
                heads = statistics.index_heads if serves else None
                if request.measures_health:
                    health = selection_health(selected, neighbour, own.visible, hidden, statistics.index_heads, topk=topk)
                    statistics, neighbour = statistics._replace(health=health), selected
                if not return_topk_indices:
                    statistics = statistics._replace(topk_indices=None)
                return (hidden, following, neighbour, heads), statistics._replace(index_heads=None)

            layer = rematerialised(layer, config.remat, in_scan=config.scan_layers)
            state = x, carried, neighbour, zero_index_heads(config, *x.shape[:2]) if serves else None
            (x, carried, neighbour, heads), statistics = run_stack(
                layer, state, params, stack.n_layers, scan=config.scan_layers
            )
            last_heads = heads if serves else last_heads
            collected.append(statistics)
        moe = [s.moe for s in collected if s.moe is not None]
        plain = [s._replace(moe=None) for s in collected]
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *plain)
        if distils:
            joined = joined._replace(indexer_kl=mean_over_served(joined.indexer_kl, self.stacks))
        return x, joined._replace(moe=jax.tree.map(lambda *parts: jnp.concatenate(parts), *moe) if moe else None)

    def _extend_layers(
        self, x: Float[Array, "B T E"], context: LayerContext, cache: Cache, request: AttentionRequest
    ) -> tuple[Float[Array, "B T E"], dict[str, Any], Int[Array, "L B T K"] | None]:
        """Run every stack over its pools: (x, new pools, selections stacked over all layers)."""
        layout, carried = cache.layout, context.previous_topk
        new_pools, collected = {}, []
        for stack, params in zip(self.stacks, self.layer_params, strict=True):
            pools = cache.pools[stack.name]
            n_slots = jax.tree.leaves(pools)[0].shape[1]
            valid = context.visible.some
            slots = token_slots(context.positions, valid, cache.block_table, layout.page_size, n_slots=n_slots)
            entries = layout.stack_entries(stack.name)

            # The pools travel in the carry, which is updated in place; as inputs and outputs of the loop they would be copied.
            def layer(state: Any, inputs: Any, block: Any = stack.block, entries: Any = entries, slots: Any = slots) -> Any:
                hidden, previous_topk, pools = state
                layer_params, number = inputs
                view = LayerCache(pools, number, entries, layout.dtype, layout.page_size, cache.block_table, slots)
                own = context._replace(previous_topk=previous_topk)
                result = block.apply({"params": layer_params}, hidden, own, view, request, method="extend")
                following = next_topk(block.layer, previous_topk, result.topk_indices)
                return (result.out, following, result.cache.pools), result.topk_indices

            inputs = params, jnp.arange(stack.n_layers, dtype=jnp.int32)
            state, indices = run_stack(layer, (x, carried, pools), inputs, stack.n_layers, scan=self.config.scan_layers)
            x, carried, new_pools[stack.name] = state
            collected.append(indices)
        return x, new_pools, None if collected[0] is None else jnp.concatenate(collected)

    def _mode(self, attention: str | None) -> str:
        return self.config.attention.mode if attention is None else attention

    def _first_topk(self, shape: tuple[int, ...], request: AttentionRequest, *, n_keys: int) -> Int[Array, "B T K"] | None:
        """The first value of the previous selection that the loop over the layers carries; None where no layer shares one."""
        if request.by_indexer and any(stack.layer.role == SHARED for stack in self.stacks):
            return self._no_topk(shape, n_keys=n_keys)
        return None

    def _no_topk(self, shape: tuple[int, ...], *, n_keys: int) -> Int[Array, "B T K"]:
        return jnp.full((*shape, min(self.config.attention.indexer.topk, n_keys)), -1, jnp.int32)

    def _is_shared(self, number: int) -> bool:
        """Whether layers that share follow the stack `number`, before the next one with an indexer of its own."""
        roles = [stack.layer.role for stack in self.stacks[number:]]
        following = [role for role in roles[1:] if role in (FULL, SHARED)]
        return roles[0] == FULL and following[:1] == [SHARED]


def next_topk(layer: LayerSpec, previous: Any, selected: Any) -> Any:
    """The selection that a later layer shares: this layer's, unless it has none of its own to hand on."""
    return selected if previous is not None and layer.role in (FULL, SHARED) else previous


def mean_over_served(kl: Float[Array, " L"], stacks: tuple[BlockStack, ...]) -> Float[Array, " L"]:
    """The KL of every layer against the index heads that it uses as the loss of each indexer: its mean over the layers served.

    KL(p || q) is linear in p up to the entropy of p, so the mean over layers l of KL(p_l || q) has the gradient of
    KL(mean_l p_l || q), the indexer's loss against the mean of the layers' attention distributions. Its value lies above that
    one by a number that does not depend on the indexer: how much the layers differ, their Jensen-Shannon divergence. That way
    no layer's distribution is ever held.

    Returns:
        The mean in the place of the layer with the indexer, 0 for those that it serves.

    Source: IndexCache (arXiv 2603.12201), the loss of multi-layer distillation.
    """
    roles = [stack.layer.role for stack in stacks for _ in range(stack.n_layers)]
    place = np.arange(len(roles))
    last_full = np.maximum.accumulate([i if role == FULL else 0 for i, role in enumerate(roles)])
    server = np.where([role == SHARED for role in roles], last_full, place)
    return jnp.zeros_like(kl).at[server].add(kl / np.bincount(server)[server].astype(np.float32))


def head_logits(hidden: Float[Array, "*N E"], kernel: Float[Array, "E V"], *, dtype: Any, scale: float) -> Float[Array, "*N V"]:
    """scale * hidden @ kernel, multiplied in `dtype`, float32; `kernel` may be a part of the vocabulary."""
    options = {"preferred_element_type": jnp.float32, "precision": precision_of(dtype)}
    return jnp.matmul(hidden.astype(dtype), kernel.astype(dtype), **options) * scale


def run_stack(layer: Callable, state: Any, params: Any, n_layers: int, *, scan: bool) -> tuple[Any, Any]:
    """Carry `state` through the layers; `scan` False unrolls them over the same stacked parameters."""
    if scan and widens_slices(params):
        return jax.lax.scan(lambda state, i: layer(state, pick(params, i)), state, jnp.arange(n_layers))
    if scan:
        return jax.lax.scan(layer, state, params)
    results = []
    for i in range(n_layers):
        state, statistics = layer(state, jax.tree.map(lambda leaf, i=i: leaf[i], params))
        results.append(statistics)
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def rematerialised(layer: Callable, policy: str, *, in_scan: bool) -> Callable:
    """`layer` with the backward pass recomputing by `policy`: "none", "full" (everything) or "dots" (all but matmuls).

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

    config: ModelConfig

    def setup(self) -> None:
        """Create the table."""
        shape = (self.config.vocab_size, self.config.hidden_dim)
        init = nn.initializers.normal(self.config.embedding_initializer_range)
        self.embedding = self.param("embedding", init, shape, jnp.dtype(self.config.param_dtype))

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Look the tokens up; an id outside the table gives NaN instead of some other token."""
        known = jnp.where(input_ids < 0, self.config.vocab_size, input_ids)
        return jnp.take(self.embedding, known, axis=0, mode="fill").astype(jnp.dtype(self.config.dtype))


class Head(nn.Module):
    """The kernel of an untied output layer; `Transformer.unembed` applies it."""

    config: ModelConfig

    def setup(self) -> None:
        """Create the kernel."""
        shape = (self.config.hidden_dim, self.config.vocab_size)
        init = nn.initializers.normal(self.config.initializer_range)
        self.kernel = self.param("kernel", init, shape, jnp.dtype(self.config.param_dtype))
