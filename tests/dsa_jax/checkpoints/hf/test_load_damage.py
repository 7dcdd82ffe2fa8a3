"""Places and files that are missing, damaged or of other shapes: every error says what is wrong and where."""

import json

import numpy as np
import pytest

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.hf import CheckpointError
from tests.dsa_jax.checkpoints.hf.tiny import config_of, tensors_of, write_checkpoint


def test_missing_places(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds a list; expected a JSON object"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_pretrained(tmp_path)


def test_missing_extra_and_misshaped_tensors_are_named_with_both_shapes(tmp_path):
    content = config_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of(content)
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"lacks {name} \[40, 32\]"):
        load_pretrained(write_checkpoint(tmp_path / "missing", content, tensors))
    tensors[name] = np.zeros((32, 40), np.float32)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors holds {name} with shape \[32, 40\], expected \[40, 32\]"):
        load_pretrained(write_checkpoint(tmp_path / "misshaped", content, tensors))
    tensors = tensors_of(content) | {"model.layers.0.mlp.extra.weight": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.extra\.weight \[3\], which the model .* no use for"):
        load_pretrained(write_checkpoint(tmp_path / "extra", content, tensors))
    tensors = tensors_of(content) | {"model.layers.0.mlp.shared_experts.up_proj.weight": np.zeros((0, 32), np.float32)}
    load_pretrained(write_checkpoint(tmp_path / "empty", content, tensors))  # as transformers writes no shared experts
    tensors = tensors_of(content) | {name: np.zeros((40, 32), np.int8)}
    with pytest.raises(CheckpointError, match=rf"{name} is of type I8"):
        load_pretrained(write_checkpoint(tmp_path / "integers", content, tensors))


def test_nothing_is_made_up_for_an_indexer_that_the_config_declares(tmp_path):
    content = config_of("deepseek_v32")
    tensors = {name: value for name, value in tensors_of(content).items() if ".indexer." not in name}
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\..*indexer"):
        load_pretrained(write_checkpoint(tmp_path, content, tensors))


def test_damaged_weight_files(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = "model.norm.weight"

    def damaged(content, match):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(directory)

    def with_header(changed):
        encoded = json.dumps(changed).encode()
        return len(encoded).to_bytes(8, "little") + encoded + whole[8 + length :]

    damaged(whole[:-1], r"is cut off: .* ends at byte")
    damaged(whole[: length // 2], "is cut off or no safetensors file")
    damaged(b"", "is cut off or no safetensors file")
    damaged(b"\xff" * 100, "is cut off or no safetensors file")
    damaged(whole[:8] + b"#" * length + whole[8 + length :], "header that is not JSON")
    damaged(with_header([1]), "no JSON object")
    damaged(with_header(header | {name: header[name] | {"shape": [31]}}), rf"{name} takes 128 bytes; expected 124")
    damaged(with_header(header | {name: header[name] | {"dtype": "F4"}}), rf"{name} has dtype F4")
    damaged(with_header(header | {name: {"dtype": "F32"}}), rf"header entry of {name}")
    damaged(with_header(header | {name: header[name] | {"data_offsets": [8, 4]}}), rf"header entry of {name}")


def test_tensors_must_fill_their_file(tmp_path):
    """As the safetensors library has it; a byte more or less in front of them would change every weight."""
    directory = write_checkpoint(tmp_path, config_of("llama"))
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    names = sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    first, second = names[:2]

    def damaged(match, *, changed=None, encoded=None, length_off=0, data=whole[8 + length :]):
        encoded = json.dumps(header | (changed or {})).encode() + b" " if encoded is None else encoded
        file.write_bytes((len(encoded) + length_off).to_bytes(8, "little") + encoded + data)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_pretrained(directory)
        assert str(file) in str(caught.value)

    size = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}
    damaged(r"model\.safetensors has \d+ bytes; expected \d+, where .* ends", length_off=-1)
    damaged("begins at byte", changed={name: header[name] | {"data_offsets": [0, size[name]]} for name in names})
    shifted = [size[first] - 4, size[first] - 4 + size[second]]
    damaged(f"{second} begins at byte", changed={second: header[second] | {"data_offsets": shifted}})
    damaged(r"bytes; expected \d+, where .* ends", data=whole[8 + length :] + b"\0")
    damaged("begins at byte .*; expected .*, where the header ends", changed={first: header[second], second: header[second]})
    without = {name: header[name] for name in header if name != second}
    damaged(f"begins at byte .*, where {first} ends", encoded=json.dumps(without).encode())
    twice = json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[first])}}}'
    damaged(f"the key '{first}' stands twice in an object", encoded=twice.encode())
    inside = json.dumps(header).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"', 1)
    damaged("the key 'dtype' stands twice in an object", encoded=inside.encode())
    damaged("names a tensor .* 501 characters", changed={"x" * 501: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})


def test_a_key_that_stands_twice_in_config_json(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text[:-1] + ', "rms_norm_eps": 0.1}')
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON: the key 'rms_norm_eps' stands twice"):
        load_pretrained(directory)


def test_a_single_file_counts_for_more_than_an_index(tmp_path, caplog):
    content = config_of("llama")
    directory = write_checkpoint(tmp_path, content, n_files=2)
    write_checkpoint(tmp_path, content, {name: value * 0 + 1 for name, value in tensors_of(content).items()})
    assert (directory / "model.safetensors.index.json").is_file()
    scale = load_pretrained(directory).params["final_norm"]["scale"]
    np.testing.assert_array_equal(scale, np.ones_like(scale))
    assert "the first is read, as transformers does" in caplog.text


def test_damaged_index_files(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"), n_files=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.norm.weight"

    def damaged(weight_map, match):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(directory)

    for outside in ("../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."):
        damaged(content["weight_map"] | {name: outside}, "expected a file in that directory")
    damaged(content["weight_map"] | {name: "model-00009.safetensors"}, r"names model-00009\.safetensors for model\.norm")
    invented = {"invented.weight": "model-00001-of-00002.safetensors"}
    damaged(content["weight_map"] | invented, r"does not hold invented\.weight, .* from one revision")
    damaged({each: file for each, file in content["weight_map"].items() if each != name}, rf"holds {name}, which .* not list")
    damaged([], "has no weight_map")
