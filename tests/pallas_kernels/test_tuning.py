"""The tuning table: what it refuses, what a call takes from it, which candidates are tried."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import tuning
from pallas_kernels.tuning import QueryTiles, RowTiles, ScanTiles, SplitTiles, Tiles, WarpgroupTiles, table

SHAPE = {"dtype": "float32", "heads": 2, "dim": 16, "groups": 1, "queries": 8, "keys": 64}
MEASURED = {"seconds": 1e-3, "default_seconds": 2e-3, "command": "made up", "versions": {"jax": "0"}}
ENTRY = {
    "kernel": "head_sums_visible_scores",
    "device": "cpu",
    "shape": SHAPE,
    "tiles": {"block_h": 16, "block_k": 32, "num_warps": 4, "num_stages": 1, "block_q": 8},
    "measured": MEASURED,
}


def written(path, *entries):
    path.write_text(json.dumps({"entries": entries}))
    return path


@pytest.fixture
def install(monkeypatch, tmp_path):
    def run(*entries):
        monkeypatch.setattr(table, "TABLE", written(tmp_path / "table.json", *entries))
        table.installed.cache_clear()

    yield run
    table.installed.cache_clear()


def test_the_committed_table_is_right_and_of_gpus():
    for entry in tuning.read():
        assert "cpu" not in entry.device.lower()


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / "table.json"
    (entry,) = tuning.read(written(tmp_path / "table.json", ENTRY))
    other = entry._replace(device="NVIDIA H200")
    better = entry._replace(tiles=QueryTiles(16, 64))
    tuning.write(path, tuning.merge([entry, other], [better]))
    assert set(map(str, tuning.read(path))) == {str(other), str(better)}
    assert [x.name for x in path.parent.iterdir()] == ["table.json"]


WRONG = {
    "kernel is 'sort'; expected one of sparse_attention_forward": ENTRY | {"kernel": "sort"},
    "lacks 'measured'": {name: x for name, x in ENTRY.items() if name != "measured"},
    "unknown field 'note'": ENTRY | {"note": ""},
    "shape lacks 'keys'": ENTRY | {"shape": {name: x for name, x in SHAPE.items() if name != "keys"}},
    "keys of shape is 0; expected at least 1": ENTRY | {"shape": SHAPE | {"keys": 0}},
    "queries of shape is '8'; expected int": ENTRY | {"shape": SHAPE | {"queries": "8"}},
    "tiles has the unknown field 'block_z'": ENTRY | {"tiles": ENTRY["tiles"] | {"block_z": 1}},
    "block_k is 48; expected a power of two of at least 16": ENTRY | {"tiles": ENTRY["tiles"] | {"block_k": 48}},
    "num_stages is 0; expected a number of at least 1": ENTRY | {"tiles": ENTRY["tiles"] | {"num_stages": 0}},
    "block_q of tiles is 8.0; expected int": ENTRY | {"tiles": ENTRY["tiles"] | {"block_q": 8.0}},
    "its sums take 512 registers": ENTRY | {"tiles": ENTRY["tiles"] | {"block_h": 256, "block_k": 256}},
    "measured lacks 'command'": ENTRY | {"measured": {"seconds": 1.0, "default_seconds": 1.0}},
    "tiles of entry is 3; expected dict": ENTRY | {"tiles": 3},
    "entry is 7; expected an object": 7,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_entries(tmp_path, message):
    with pytest.raises(tuning.TuningError, match=f"entry 1: .*{message}.*Correct or remove it"):
        tuning.read(written(tmp_path / "table.json", ENTRY | {"device": "other"}, WRONG[message]))


def test_wrong_tables(tmp_path):
    path = tmp_path / "table.json"
    for content, message in (("{", "is no JSON"), ("[]", "expected {"), ('{"entries": 1}', "expected {")):
        path.write_text(content)
        with pytest.raises(tuning.TuningError, match=message):
            tuning.read(path)
    with pytest.raises(tuning.TuningError, match="twice"):
        tuning.read(written(path, ENTRY, ENTRY))


def test_nearest():
    entry = tuning.Entry("head_sums_visible_scores", "cpu", SHAPE, QueryTiles(16, 32), MEASURED)
    far = entry._replace(shape=SHAPE | {"queries": 32})
    near = lambda device="cpu", **sizes: tuning.nearest([entry, far], entry.kernel, device, SHAPE | sizes)
    assert near() is entry and near(keys=256) is entry and near(queries=30) is far
    assert near(queries=16) is entry  # as far from both: the first
    for other in ({"keys": 257}, {"queries": 1}, {"heads": 4}, {"dtype": "bfloat16"}, {"device": "NVIDIA H200"}):
        assert near(**other) is None
    assert tuning.nearest([entry], "head_sums_visible_ranked_scores", "cpu", SHAPE) is None


def scores(queries=8):
    rng = np.random.default_rng(0)
    q, k, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, queries, 2, 16), (1, 64, 16), (1, queries, 2)))
    start, end = jnp.zeros((1, queries), jnp.int32), jnp.full((1, queries), 64, jnp.int32)
    with tuning.recorded() as choices:
        out = pk.index_scores(pk.IndexHeads(q, k, w), pk.Visible(start, end), implementation="pallas")
    return np.asarray(out), choices


def test_a_call_takes_trial_then_table_then_default(install):
    install()
    expected, (choice,) = scores()
    assert choice.source == "default" and choice.tiles == choice.default and choice.shape == SHAPE
    install(ENTRY)
    out, (choice,) = scores()
    assert choice.source == "table" and choice.tiles == QueryTiles(16, 32, 4, 1, block_q=8)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    with tuning.trial({"head_sums_visible_scores": QueryTiles(16, 16)}):
        assert scores()[1][0].source == "trial"
    with tuning.trial({"head_sums_visible_scores": Tiles(16, 16)}), pytest.raises(tuning.TuningError, match="QueryTiles"):
        scores()
    assert scores(queries=33)[1][0].source == "default"


DEEPSEEK = {"dtype": "bfloat16", "heads": 128, "dim": 576, "width": 512, "shared": True}
SIZES = {"groups": 1, "queries": 4096, "keys": 32768, "topk": 2048, "slots": 4096 * 2048}
DEFAULTS = {
    SplitTiles: SplitTiles(64, 32),
    QueryTiles: QueryTiles(32, 64),
    RowTiles: RowTiles(),
    ScanTiles: ScanTiles(),
    WarpgroupTiles: WarpgroupTiles(),
}


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates(kernel):
    shape = {**DEEPSEEK, **SIZES}
    if kernel.startswith(("index_gradients", "mosaic")):
        shape |= {"heads": 64, "dim": 128, "width": 128}
    default = DEFAULTS.get(tuning.KERNELS[kernel].tiles, Tiles(64, 32))
    found = tuning.candidates(kernel, default, shape)
    assert found[0] == default and len(set(found)) == len(found) > 8
    assert tuning.candidates(kernel, default, shape, limit=5) == found[:5]
    assert {type(tiles) for tiles in found} == {tuning.KERNELS[kernel].tiles}
    assert not [tiles for tiles in found if tuning.misfit(kernel, tiles, shape)]
    # Few queries, few keys: nothing larger than they are.
    small = shape | {"heads": 2, "topk": 20, "keys": 20, "queries": 3, "slots": 60, "dim": 64, "width": 64}
    for tiles in tuning.candidates(kernel, default, small)[1:]:
        sizes = dataclasses.asdict(tiles)
        assert sizes.get("block_h", 16) == 16 and sizes.get("block_k", 16) <= 32 and sizes.get("block_q", 8) == 8


def test_misfit():
    shape = {**DEEPSEEK, **SIZES}
    assert tuning.misfit("sparse_attention_forward", SplitTiles(64, 32), shape) is None
    assert "256 registers" in tuning.misfit("sparse_attention_forward", SplitTiles(128, 32), shape)
    assert "more than the 232448" in tuning.misfit("sparse_attention_forward", SplitTiles(64, 256), shape)
    assert "all 128 heads" in tuning.misfit("index_gradients_selected", Tiles(64, 32), shape)
