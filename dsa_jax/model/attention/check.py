"""Check of a request against the layers of a model, before anything is traced."""

from dsa_jax.config import ModelConfig
from dsa_jax.config.selections import check_selection, selection
from dsa_jax.model.attention.kinds import kinds_of
from dsa_jax.model.outputs import AttentionRequest


def check_request(
    config: ModelConfig, request: AttentionRequest, *, return_topk_indices: bool = False, cached: bool = False
) -> None:
    """Reject a request that the model's layers cannot answer.

    Raises:
        ValueError: for an unknown mode or loss, or a combination of them that this model cannot compute.
        NotImplementedError: for one that a mode of a single attention kind does not have.
    """
    check_selection("attention", request.attention)
    has_indexer = config.attention.indexer.enabled
    if request.indexer_loss not in (None, "dense", "sparse"):
        raise ValueError(f"indexer_loss is {request.indexer_loss!r}; expected None, 'dense' or 'sparse'.")
    if request.indexer_loss and not has_indexer:
        raise ValueError(
            f"indexer_loss is {request.indexer_loss!r}, but the model has no indexer. Set model.attention.indexer.enabled=True."
        )
    row = selection(request.attention)
    if row.kind:
        config.attention.check_can_run("attention", request.attention)
        for kind in kinds_of(config):
            if row.name in (mode.name for mode in kind.modes):
                kind.check_mode(request, return_topk_indices=return_topk_indices, cached=cached)
    elif not request.selects:
        if request.indexer_loss == "sparse":
            raise ValueError(
                "indexer_loss is 'sparse' with attention 'dense', which selects no keys; expected indexer_loss 'dense', or an "
                "attention that selects, such as 'sparse'."
            )
        if return_topk_indices:
            raise ValueError(
                "return_topk_indices is True with attention 'dense', which selects no keys. Use attention='sparse' to see what "
                "the indexer selects."
            )
    elif request.by_indexer and not has_indexer:
        raise ValueError(
            f"attention is {request.attention!r}, but the model has no indexer. Set "
            "model.attention.indexer.enabled=True, or use 'dense' or 'window'."
        )
