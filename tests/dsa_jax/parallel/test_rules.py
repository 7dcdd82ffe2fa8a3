import jax
import pytest
from jax.sharding import PartitionSpec

from configs import deepseek_v32, llama3_8b
from dsa_jax.config import AXES, ConfigError, ParallelConfig
from dsa_jax.model import abstract_params, build_model
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.rules import check_divisible, parameter_spec
from dsa_jax.params import parameter_paths
from tests.dsa_jax.model.small import built


def parameter_specs(params):
    return {path: parameter_spec(path) for path in parameter_paths(params)}


@pytest.fixture(scope="module")
def v32():
    return abstract_params(build_model(deepseek_v32.get_config().model))


@pytest.mark.parametrize("kind", ["gqa_qwen", "mla", "mla_plain"])
def test_every_parameter_has_a_rule(kind):
    specs = parameter_specs(built(kind, moe=kind == "mla")[1])
    assert specs["embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert all(len(spec) <= 4 for spec in specs.values())


def test_large_parameters_are_split_and_the_indexer_is_equal_on_tensor_ranks(v32):
    specs = parameter_specs(v32)
    assert specs["moe_layers/mlp/experts/gate/kernel"] == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert specs["moe_layers/attention/wo/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["moe_layers/attention/wq_b/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    indexer = {path: spec for path, spec in specs.items() if "/indexer/" in path}
    assert indexer and not any("tensor" in spec for spec in indexer.values())
    with pytest.raises(ValueError, match=r"no attention kind has a row for .*novel"):
        parameter_spec("moe_layers/attention/novel/kernel")


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("single", (1, 1, 1, 1, 1)),
        ("fsdp8", (1, 8, 1, 1, 1)),
        ("ep4_tp2", (1, 1, 4, 2, 1)),
        ("fsdp2_tp2_cp2", (1, 2, 1, 2, 2)),
        ("dp2_fsdp4", (2, 4, 1, 1, 1)),
    ],
)
def test_presets(preset, sizes):
    assert ParallelConfig(preset=preset).sizes() == dict(zip(AXES, sizes, strict=True))


def test_an_axis_overrides_its_preset():
    assert ParallelConfig(preset="fsdp8", fsdp=4, tensor=2).sizes() == dict(zip(AXES, (1, 4, 1, 2, 1), strict=True))


@pytest.mark.parametrize("preset", ["fsdp", "xp8", "tp2_tp4", "8fsdp", "fsdp0", ""])
def test_unreadable_presets_are_named(preset):
    with pytest.raises(ConfigError, match=r"parallel\.preset"):
        ParallelConfig(preset=preset).validate()


def test_mesh_needs_as_many_devices():
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES
    with pytest.raises(ConfigError, match=r"needs 64 devices \(fsdp 8 x tensor 8\)"):
        make_mesh(ParallelConfig(preset="fsdp8_tp8"))


def test_sizes_that_do_not_divide_are_named(v32):
    check_divisible(v32, ParallelConfig(preset="ep8").sizes())
    check_divisible(v32, ParallelConfig(preset="fsdp2_tp2_cp2").sizes())
    with pytest.raises(ConfigError, match=r"parallel.expert is 3, .*experts/[\w/]+ with shape \(58, 256"):
        check_divisible(v32, ParallelConfig(expert=3).sizes())
    llama = abstract_params(build_model(llama3_8b.get_config().model))
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 5"):
        check_divisible(llama, ParallelConfig(tensor=5).sizes())
