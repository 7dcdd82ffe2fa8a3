"""The dry run against what it says nothing was allocated for: counts, bytes on devices, compiled programs, HLO by hand."""

import importlib
import math
import pkgutil

import jax
import numpy as np
import pytest

import configs
from configs import h200x8_deepseek_v2_lite
from dsa_jax.checkpoints.from_hf import resolve_checkpoint
from dsa_jax.config import Config, ConfigError, OptimizerConfig, StageConfig
from dsa_jax.dryrun import (
    Collective,
    DecodeShape,
    bytes_per_device,
    collectives,
    compile_step,
    emulated_mesh,
    format_compiled,
    format_summary,
    format_weak_scaling,
    matmul_flops,
    rungs,
    sharding_table,
    summarize,
    target_mesh,
    weak_scaling,
)
from dsa_jax.model import abstract_params, build_model
from dsa_jax.parallel.check import check_layout
from dsa_jax.parallel.placement import place
from dsa_jax.train import loss as loss_module
from dsa_jax.train.stages import STAGES
from dsa_jax.train.step import init_state
from tests.dsa_jax.train.tiny import tiny_config
from tests.experiments.commands import ROOT

RECIPES = [name for _, name, is_package in pkgutil.iter_modules(configs.__path__) if not is_package]


def recipe(preset="fsdp4_tp2", **tiny):
    config = tiny_config("gqa", **tiny)
    config.model.remat = "full"
    config.parallel.preset = preset
    config.eval.batch_size = 8
    for name in STAGES:
        getattr(config.train, name).batch_size = 8
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name):
    """Builds, validates, divides over its mesh, and the whole text comes out."""
    config = importlib.import_module(f"configs.{name}").get_config()
    if name.startswith("retrofit_hf"):
        config.init.hf_dir = str(ROOT / "tests" / "fixtures" / "configs" / "qwen3_8b")
        config = resolve_checkpoint(config)
    config.validate()
    summary = summarize(config)
    text = format_summary(summary, 141e9)
    assert f"{summary['parameters']['total']:,}" in text and "GB per device" in text
    assert summary["n_devices"] == (8 if name.startswith("h200x8") or name == "retrofit_qwen3_8b" else 1)
    assert sum(row["bytes"] for row in summary["sharding"]) == summary["parameter_bytes"]
    assert set(summary["stages"]) == {stage for stage in STAGES if getattr(config.train, stage).n_steps}


@pytest.mark.parametrize("preset", ["ep8", "fsdp2_ep4", "fsdp4_cp2"])
def test_other_layouts_of_a_recipe(preset):
    config = h200x8_deepseek_v2_lite.get_config(preset)
    config.validate()
    check_layout(config)
    assert math.prod(config.parallel.sizes().values()) == 8


def test_bytes_are_those_of_real_arrays():
    """Parameters and optimizer state on each of eight devices, split as training splits them."""
    config = recipe()
    summary = summarize(config)
    params = abstract_params(build_model(config.model))
    assert summary["parameters"]["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    state = jax.eval_shape(lambda params: init_state(params, STAGES["sparse"], config.train.sparse), params)
    with jax.set_mesh(emulated_mesh(config)):
        state = place(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state))
    held = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    assert summary["parameter_bytes"] == held(state.params) < sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert summary["stages"]["sparse"]["optimizer"] == held(state.opt_state)


def test_table_by_hand():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    params = {"embed": {"embedding": leaf(10, 6)}, "moe_layers": {"mlp": {"experts": {"up": {"kernel": leaf(3, 8, 6, 4)}}}}}
    sizes = {"data": 1, "fsdp": 3, "expert": 2, "tensor": 1, "context": 1}
    embedding, experts = sharding_table(params, sizes)
    # tensor is 1, so that the first axis is whole; bfloat16 takes two bytes.
    assert embedding["spec"] == [None, "fsdp"] and embedding["bytes"] == 10 * 2 * 2
    assert experts["spec"] == [None, "expert", "fsdp", None] and experts["bytes"] == 3 * 4 * 2 * 4 * 2
    assert bytes_per_device(params, sizes) == 40 + 192
    assert bytes_per_device(params, sizes | {"fsdp": 4}) == 10 * 2 * 2 + 3 * 4 * 2 * 4 * 2  # padded up to 2


def test_what_layers_save():
    """With full rematerialisation: the residual stream, the selection, and what says which keys are visible."""
    config = recipe("fsdp8")
    stages = summarize(config)["stages"]
    n_tokens = 8 * 16 // 8
    hidden, topk = 4 * config.model.hidden_dim, 4 * config.model.attention.indexer.topk
    least = n_tokens * (2 * (hidden + topk) + hidden)
    saved = stages["sparse"]["activations"]["saved"]
    assert least <= saved <= least + 2 * n_tokens * 16 + 256
    assert stages["sparse"]["activations"]["layer"] > saved / 2
    # Nothing but the indexer learns in the warm-up, and it learns within each layer.
    assert stages["warmup"]["activations"]["saved"] <= n_tokens * (2 * (hidden + 16) + hidden) + 256
    config.model.remat = "none"
    whole = summarize(config)["stages"]["sparse"]["activations"]
    assert whole["saved"] == 2 * whole["layer"] + n_tokens * hidden


def test_accumulation_halves_activations_and_adds_a_sum():
    config = recipe("dp8")
    config.train.pretrain.batch_size, config.train.sparse.steps, config.train.warmup.steps = 16, 0, 0
    once = summarize(config)["stages"]["pretrain"]
    config.train.pretrain.accumulation = 2
    twice = summarize(config)["stages"]["pretrain"]
    assert twice["gradients"] == 2 * once["gradients"]
    assert twice["activations"]["saved"] == pytest.approx(once["activations"]["saved"] / 2, rel=0.01)


def test_the_longest_length_of_a_curriculum_counts():
    plain, growing = recipe("dp8"), recipe("dp8")
    length = plain.train.pretrain.seq_len
    growing.train.pretrain.curriculum = ((4, 2 * length),)
    plain.train.pretrain.seq_len = 2 * length
    assert summarize(growing)["stages"]["pretrain"] == summarize(plain)["stages"]["pretrain"]


HLO = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[4,32]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={1}
  %s = f32[4]{0} reduce-scatter(%y), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  ROOT %result = (s32[], f32[8]) tuple(%i, %s)
}

%condition.1 (state: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"27"}}
  %r = (f32[8]{0}, f32[2]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add
  %q = f32[8]{0} all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
  %start = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  ROOT %out = f32[8]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_by_hand():
    assert collectives(HLO) == [
        Collective("all-gather", "bf16[4,32]", group=2, times=27, bytes=27 * 256),
        Collective("reduce-scatter", "f32[4]", group=2, times=27, bytes=27 * 32),
        Collective("all-gather", "f32[64]", group=8, times=1, bytes=256),
        Collective("all-reduce", "f32[8], f32[2]", group=8, times=1, bytes=40),
        Collective("all-reduce", "f32[8]", group=2, times=1, bytes=32),
        Collective("collective-permute", "f32[8]", group=0, times=1, bytes=32),
    ]


def test_compiled_training_step(monkeypatch):
    """The compiler's arguments are ours; the head is gathered once and its gradient summed once, whatever the chunks."""
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 2 * 320 * 4)
    config = recipe("fsdp8")
    config.model.n_layers = 1
    summary = summarize(config)
    compiled = compile_step(config, "pretrain", emulated_mesh(config))
    batch = 16 * (3 * 4 + 1)
    state = summary["parameter_bytes"] + summary["stages"]["pretrain"]["optimizer"] + 3 * 4
    assert compiled.arguments == state + batch
    assert compiled.aliased == state and compiled.temporaries > 0
    assert compiled.peak == compiled.arguments + compiled.outputs - compiled.aliased + compiled.temporaries
    of_head = [each for each in compiled.collectives if "320" in each.shape]
    assert of_head and all(each.times <= 2 for each in of_head)
    text = format_compiled(compiled, 141e9)
    assert "fits in 141 GB" in text and "all-gather" in text


def test_compiled_decode_step():
    """The cache is the same on every device, the parameters are split."""
    config = recipe("tp4")
    config.model.attention.n_kv_heads = 4
    config.model.n_layers = 1
    compiled = compile_step(config, "decode", emulated_mesh(config), DecodeShape(rows=2, context=64))
    cache = 2 * 64 * 4 * (2 * 4 * 8 + 8)
    rest = 2 * (4 + 4 + 1) + 4 + 4 + 4 + 4
    parameters = summarize(config)["parameter_bytes"]
    assert compiled.arguments == pytest.approx(parameters + cache + rest, abs=64)
    assert compiled.collectives and math.prod(config.parallel.sizes().values()) == compiled.collectives[0].group


def test_decode_step_with_weights_in_fp8():
    """A byte per weight and four per block: what is declared, what the rules split, and what the compiler takes."""
    config = recipe("tp4")
    config.model.attention.n_kv_heads = 4
    config.model.n_layers = 1
    plain = summarize(config)
    shape = DecodeShape(rows=2, context=64)
    before = compile_step(config, "decode", emulated_mesh(config), shape).arguments
    for name in STAGES:
        getattr(config.train, name).steps = 0
    config.model.weight_format = "fp8_blocks"
    config.validate()
    kept = summarize(config)
    assert kept["parameters"] == plain["parameters"]
    scales = {row["path"]: row for row in kept["sharding"] if row["path"].endswith("block_scales")}
    narrow = [row for row in plain["sharding"] if row["path"].removesuffix("kernel") + "block_scales" in scales]
    assert len(narrow) == len(scales) == 9 and not any(any(row["spec"]) for row in scales.values())
    saved = sum(row["bytes"] for row in narrow) * 3 // 4 - sum(row["bytes"] for row in scales.values())
    assert plain["parameter_bytes"] - kept["parameter_bytes"] == saved
    assert before - compile_step(config, "decode", emulated_mesh(config), shape).arguments == pytest.approx(saved, abs=64)
    assert "float8_e4m3fn" in format_summary(kept, 141e9)


@pytest.mark.parametrize(
    ("target", "message"), [("h300x8", "the target is 'h300x8'"), ("h200", "such as h200x8"), ("h200x0", "such as h200x8")]
)
def test_unknown_targets(target, message):
    with pytest.raises(ConfigError, match=message):
        target_mesh(recipe(), target)


def test_what_cannot_be_compiled_says_so():
    config = Config(name="plain")
    config.train.pretrain = StageConfig(steps=1, optimizer=OptimizerConfig())
    mesh = emulated_mesh(config)
    with pytest.raises(ConfigError, match="no indexer"):
        compile_step(config, "sparse", mesh)
    config.parallel.preset, config.train.pretrain.batch_size = "dp8", 3
    with pytest.raises(ConfigError, match=r"train\.pretrain\.batch_size / accumulation is 3; expected a multiple of 8"):
        compile_step(config, "pretrain", mesh)
    with pytest.raises(ConfigError, match="one of pretrain, warmup, sparse, decode"):
        compile_step(config, "train", mesh)
    with pytest.raises(ConfigError, match=r"more than model\.max_positions"):
        compile_step(config, "decode", mesh, DecodeShape(context=10**6))


def test_products_by_hand():
    """A product in a loop of 27, one with a batch axis, and one with a vector, whose operand says its shape."""
    in_loop = "  %a.1 = f32[6,5]{1,0} parameter(1)\n  %p = f32[6,7]{1,0} dot(%a.1, %b), lhs_contracting_dims={1}\n"
    in_main = (
        "  %k = f32[3,8,4]{2,1,0} parameter(1)\n  %m = f32[8,9]{1,0} parameter(2)\n"
        "  %d = f32[3,8,6]{2,1,0} dot(%k, %l), lhs_batch_dims={0}, lhs_contracting_dims={2}\n"
        "  %v = f32[8]{0} dot(f32[8,9]{1,0} %m, %n), lhs_contracting_dims={1}\n"
    )
    text = HLO.replace("  %gathered", f"{in_loop}  %gathered").replace("  %w = (s32[]", f"{in_main}  %w = (s32[]")
    assert matmul_flops(text) == 27 * 2 * 6 * 7 * 5 + 2 * 3 * 8 * 6 * 4 + 2 * 8 * 9


def test_weak_scaling():
    """Twice the devices with twice the rows: the same products on each, more moved; one device moves nothing."""
    assert [tuple(filter(lambda size: size > 1, sizes.values())) for sizes in rungs("ep4_tp2")] == [(), (2,), (4,), (4, 2)]
    assert [sizes["fsdp"] for sizes in rungs("fsdp6")] == [1, 2, 6]
    config = recipe("single")
    config.model.n_layers, config.train.pretrain.batch_size = 1, 2
    one, two = weak_scaling(config, ["fsdp2"], "pretrain", DecodeShape())
    assert one.n_devices == 1 and not one.moved and one.flops > 0
    assert two.n_devices == 2 and two.moved["all-gather"] > 0 and two.flops == one.flops
    assert "| fsdp2 | 2 | fsdp 2 |" in format_weak_scaling("pretrain", [one, two])
