from dsa_jax.checkpoints.hf.families import FAMILIES
from dsa_jax.config.families import families


def test_configs_know_the_families_that_have_rows():
    assert set(families()) == set(FAMILIES)
