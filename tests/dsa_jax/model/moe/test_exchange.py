import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.model.moe import experts as experts_module
from dsa_jax.model.moe.exchange import to_owners
from dsa_jax.model.moe.experts import ExpertKernels, routed_sum
from tests.dsa_jax.parallel.meshes import mesh

N_EXPERTS, DIM, WIDTH, BATCH, LENGTH, PER_TOKEN = 8, 6, 16, 8, 4, 2


@jax.jit
def loss_and_gradients(x, weights, kernels, experts):
    def loss(x, weights, kernels):
        out = routed_sum(x, experts, weights, kernels)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, kernels)
    return out, gradients


def arguments(assignment):
    """Random rows and kernels; `assignment` says which experts the tokens go to."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: 0.3 * jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shape = (BATCH, LENGTH, PER_TOKEN)
    experts = {
        "random": rng.integers(0, N_EXPERTS, shape),
        "all to one": np.full(shape, 5),  # one owner receives every row
        "own": np.repeat(np.arange(BATCH), LENGTH * PER_TOKEN).reshape(shape) % N_EXPERTS,
    }[assignment]
    kernels = ExpertKernels(normal(N_EXPERTS, DIM, WIDTH), normal(N_EXPERTS, DIM, WIDTH), normal(N_EXPERTS, WIDTH, DIM))
    return normal(BATCH, LENGTH, DIM), jnp.abs(normal(*shape)), kernels, jnp.asarray(experts, jnp.int32)


@pytest.mark.parametrize("preset", ["ep8", "ep4_tp2", "fsdp2_tp2_cp2"])
@pytest.mark.parametrize("assignment", ["random", "all to one", "own"])
def test_spread_experts_compute_what_one_device_does(preset, assignment):
    given = arguments(assignment)
    expected = loss_and_gradients(*given)
    with jax.set_mesh(mesh(preset)):
        found = loss_and_gradients(*given)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "n_owners", "per_piece", "assignment"),
    [("ep8", 8, 2, "all to one"), ("ep4_tp2", 4, 3, "all to one"), ("ep4_tp2", 4, 3, "random")],
)
def test_pieces_compute_what_the_whole_does(preset, n_owners, per_piece, assignment, monkeypatch):
    """A device's four tokens by twos, or its eight by threes with one of padding; no buffer has room for all."""
    given = arguments(assignment)
    expected = loss_and_gradients(*given)
    monkeypatch.setattr(experts_module, "EXCHANGE_BYTES", n_owners * per_piece * PER_TOKEN * DIM * 4)
    with jax.set_mesh(mesh(preset)):
        program = jax.jit(lambda *given: loss_and_gradients.__wrapped__(*given)).lower(*given).compile()
        found = program(*given)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    whole = BATCH // n_owners * LENGTH
    assert f"f32[{n_owners},{per_piece * PER_TOKEN},{DIM}]" in program.as_text()
    assert f"f32[{n_owners},{whole * PER_TOKEN},{DIM}]" not in program.as_text()


def test_the_plain_sum_is_a_sum_over_chosen_experts():
    x, weights, kernels, experts = arguments("random")
    out, _ = loss_and_gradients(x, weights, kernels, experts)
    gate, up, down = (k[experts] for k in kernels)
    hidden = jax.nn.silu(jnp.einsum("bte,btkef->btkf", x, gate)) * jnp.einsum("bte,btkef->btkf", x, up)
    expected = jnp.einsum("btkf,btkfe,btk->bte", hidden, down, weights)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_the_ragged_exchange_lowers_for_gpus():
    """XLA has none on CPU, so it can only be lowered here."""
    exchange = lambda rows, counts: to_owners(rows, counts, implementation="ragged").rows
    with jax.set_mesh(mesh("ep8")):
        spec = jax.sharding.PartitionSpec("expert")
        spread = jax.jit(jax.shard_map(exchange, in_specs=(spec, spec), out_specs=spec, check_vma=False))
        text = spread.trace(jnp.zeros((64, DIM)), jnp.zeros(64, jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_all_to_all" in text
    with pytest.raises(ValueError, match="telepathy"):
        to_owners(jnp.zeros((2, DIM)), jnp.zeros(2, jnp.int32), implementation="telepathy")
